"""An engine over several devices serves what it serves on one: logits, greedy and sampled tokens, under preemption and
evictions, with ranks that the devices do not divide."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from slora_jax import Engine, EngineConfig, RequestOutput, SamplingParams
from slora_jax.adapters import LoraAdapter, random_adapter
from slora_jax.engine import adapter_geometry
from slora_jax.memory import PageKind
from slora_jax.models import ModelConfig, init_random

VOCAB, PAGE_SIZE, NEW_TOKENS = 259, 8, 24  # the vocabulary is no multiple of any degree
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,  # fewer than eight shards
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "mlp_bias": True,
}
RANKS = (1, 3, 8, 13, 16)
PROMPTS = (5, 17, 30, 2, 9, 21, 40, 3, 11)
ADAPTERS = (None, "1", "3", "8", "13", "16", None, "13", "uneven")
CONFIG = EngineConfig(
    dtype="float32",
    num_pages=62,
    page_size=PAGE_SIZE,
    max_seqs=4,
    max_tokens_per_step=16,
    max_model_len=96,
    max_rank=16,
    decode_buckets=(4,),
    mixed_buckets=(16,),
    keep_logits=True,
    progress=False,
)


class Served:
    """The model and its adapters, and an engine for every degree."""

    def __init__(self) -> None:
        self.model = ModelConfig.from_dict(HF_CONFIG)
        self.graphdef, params = init_random(self.model, "float32", seed=0)
        # Gains, and biases, that show in the tokens.
        self.params = jax.tree.map(lambda x: x * (2 / (0.02 * math.sqrt(x.shape[0])) if x.ndim > 1 else 1.0), params)
        for layer in self.params["layers"].values():
            for stack in ("qkv", "o", "gate_up", "down"):
                layer[stack]["bias"] = layer[stack]["bias"] * 20
        geometry = adapter_geometry(self.model, PAGE_SIZE)
        self.adapters: dict[str, LoraAdapter] = {str(r): random_adapter(geometry, r, seed=r) for r in RANKS}
        self.adapters["uneven"] = random_adapter(geometry, {"q": 9, "v": 2, "o": 5, "up": 7, "down": 11}, seed=0)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, VOCAB, length).tolist() for length in PROMPTS]

    def engine(self, tp: int, first_device: int = 0) -> Engine:
        config = replace(CONFIG, tp=tp, tp_first_device=first_device)
        engine = Engine(self.model, self.graphdef, self.params, config)
        for name, adapter in self.adapters.items():
            engine.load_adapter(name, adapter)
        return engine

    def greedy(self, engine: Engine, order: np.ndarray) -> list[RequestOutput]:
        """In the order of the prompts, whatever the order they are submitted in."""
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = engine.generate([self.prompts[i] for i in order], params, [ADAPTERS[i] for i in order])
        return [outputs[i] for i in np.argsort(order)]

    def sampled(self, engine: Engine) -> list[RequestOutput]:
        params = [
            SamplingParams(max_tokens=8, temperature=0.8 * (i % 3), top_k=20, top_p=0.9, seed=i, logprobs=3)
            for i in range(len(PROMPTS))
        ]
        return engine.generate(self.prompts, params, list(ADAPTERS))


@contextmanager
def squeezed(engine: Engine, pages: int) -> Iterator[None]:
    """Leaves the engine only so many free pages, so that running sequences collide."""
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    held = engine.allocator.allocate(engine.allocator.num_free - pages, PageKind.KV)
    yield
    engine.allocator.free(held)


@pytest.fixture(scope="module")
def served() -> Served:
    return Served()


@pytest.fixture(scope="module")
def on_one_device(served: Served) -> dict[str, list[RequestOutput]]:
    with served.engine(1) as engine:
        return {"greedy": served.greedy(engine, np.arange(len(PROMPTS))), "sampled": served.sampled(engine)}


@pytest.fixture(scope="module", params=[2, 4, 8], ids=lambda tp: f"tp{tp}")
def engine(request: pytest.FixtureRequest, served: Served) -> Iterator[Engine]:
    with served.engine(request.param) as engine:
        yield engine


def test_logits_and_greedy_tokens_are_those_of_one_device(engine: Engine, served: Served, on_one_device) -> None:
    rng = np.random.default_rng(1)
    before = engine.stats()
    largest = max(info.num_pages for info in engine.adapters())
    for order in (np.arange(len(PROMPTS)), rng.permutation(len(PROMPTS))):
        with squeezed(engine, largest + 11):  # the longest sequence has 8
            outputs = served.greedy(engine, order)
        for output, expected in zip(outputs, on_one_device["greedy"], strict=True):
            assert output.token_ids == expected.token_ids, output.adapter
            assert output.logits.shape == expected.logits.shape == (NEW_TOKENS, VOCAB)
            error = np.abs(output.logits - expected.logits).max() / np.abs(expected.logits).max()
            assert error <= 1e-4, f"{output.adapter}: logits differ by {error:.1e} of the largest"
    stats = engine.stats()
    assert stats.preemptions > before.preemptions, "the pool is too large to force preemption"
    assert stats.adapter_evictions > before.adapter_evictions, "the pool is too large to force evictions"
    engine.check()
    texts = {tuple(output.token_ids) for output in on_one_device["greedy"]}
    assert len(texts) == len(PROMPTS) and min(len(set(text)) for text in texts) > NEW_TOKENS // 3


def test_sampled_tokens_and_logprobs_are_those_of_one_device(engine: Engine, served: Served, on_one_device) -> None:
    for output, expected in zip(served.sampled(engine), on_one_device["sampled"], strict=True):
        assert output.token_ids == expected.token_ids
        for one, other in zip(output.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_adapters_come_and_go_without_a_trace(engine: Engine, served: Served, on_one_device) -> None:
    """A name is given other weights and its own again; in between its pages belong to others."""
    for name, other in (("13", "1"), ("8", "16")):
        engine.load_adapter(name, served.adapters[other])
        prompts = [served.prompts[i] for i in (4, 5)]
        engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), [name, None])
        engine.load_adapter(name, served.adapters[name])
    for output, expected in zip(served.greedy(engine, np.arange(len(PROMPTS))), on_one_device["greedy"], strict=True):
        assert output.token_ids == expected.token_ids, output.adapter
    engine.check()


def test_two_groups_of_devices_serve_side_by_side(served: Served, on_one_device) -> None:
    """Data parallelism: two engines, each on two devices, take turns step by step."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    with served.engine(2) as one, served.engine(2, first_device=2) as other:
        for i, prompt in enumerate(served.prompts):
            (one, other)[i % 2].add_request(prompt, params, ADAPTERS[i], request_id=str(i))
        found = {}
        while one.has_work() or other.has_work():
            found |= {delta.request_id: delta.output for delta in one.step() + other.step() if delta.output}
        for i, expected in enumerate(on_one_device["greedy"]):
            assert found[str(i)].token_ids == expected.token_ids
        groups = [
            {shard.device for shard in engine._runner.worker.pool[0].addressable_shards} for engine in (one, other)
        ]
        assert not groups[0] & groups[1]


def test_each_device_holds_its_part_and_no_more(engine: Engine, served: Served) -> None:
    runner, tp = engine._runner, engine.config.tp
    for layer in runner.worker.pool:
        assert {shard.data.shape for shard in layer.addressable_shards} == {(*layer.shape[:3], layer.shape[3] // tp)}
    assert runner.worker.pool[0].shape[3] == 8 * max(tp, 4)  # eight shards: each KV head is on two
    matrices = [leaf for leaf in jax.tree.leaves(runner.worker.params) if leaf.ndim == 2]
    for leaf in matrices:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // tp}
    assert len({shard.device for shard in matrices[0].addressable_shards}) == tp
