"""How large the comparison is: the model, the pool, the requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slora_jax import EngineConfig
from slora_jax.models import ModelConfig, RopeConfig


@dataclass(frozen=True)
class Scale:
    """model: a random one in float32. engine: what all sides have in common; one shape, so that the programs are
    compiled once and then found in the cache. adapters: registered, of `ranks` in turn. small_memory: bytes of host
    memory for adapters where most of them are to be on disk. requests: of a round of each load. rounds: timed ones,
    after one that is not. splits: shares of the pool set aside for adapters. disk_seconds: that a read from the slow
    disk takes longer. load: requests per second, where they arrive over time, as a share of what the slower side
    answers when all are there at once. simulated_seconds: of arrivals in each simulated workload. seed: of weights and
    requests."""

    model: ModelConfig
    engine: EngineConfig
    adapters: int = 200
    ranks: tuple[int, ...] = (8, 16, 32)
    small_memory: int = 3 << 20
    requests: int = 160
    rounds: int = 5
    splits: tuple[float, ...] = (0.25, 0.5, 0.75)
    disk_seconds: float = 0.02
    load: float = 0.8
    simulated_seconds: float = 300.0
    seed: int = 0


def _model(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_layers=layers,
        num_heads=4, num_kv_heads=4, head_dim=hidden // 4, rope=RopeConfig(theta=10000.0), rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip


ENGINE = EngineConfig(
    dtype="float32", num_pages=241, max_num_seqs=32, max_num_batched_tokens=128, max_model_len=256, max_lora_rank=32,
    adapter_slots=80, decode_buckets=(32,), mixed_buckets=(128,), progress=False,
)  # fmt: skip

FULL = Scale(model=_model(128, 2), engine=ENGINE)

QUICK = Scale(
    model=_model(32, 1),
    engine=replace(
        ENGINE, num_pages=97, max_num_seqs=4, max_num_batched_tokens=32, adapter_slots=40, decode_buckets=(4,),
        mixed_buckets=(32,),
    ),
    adapters=60, small_memory=1 << 17, requests=24, rounds=1, splits=(0.5,), disk_seconds=0.005, simulated_seconds=20.0,
)  # fmt: skip
"""The same in half a minute, to see that it runs; its numbers mean nothing."""
