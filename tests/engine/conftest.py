"""A tiny model whose greedy outputs vary, a dense float64 reference that shares no code with the engine, counters."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from byte_level import VOCAB_SIZE, train_tokenizer
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax import Engine, EngineConfig
from slora_jax.adapters import BaseGeometry, LoraAdapter
from slora_jax.memory import PageKind
from slora_jax.models import ModelConfig, Params, init_random
from slora_jax.models.hf import tensor_placements

PAGE_SIZE = 8
EOS = 1
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "eos_token_id": EOS,
}
SMALL = {
    "num_pages": 81,
    "max_seqs": 4,
    "max_tokens_per_step": 16,
    "max_model_len": 96,
    "max_rank": 16,
    "decode_buckets": (4,),
    "mixed_buckets": (16,),
}
"""One engine shape for all tests that need no other: compiled once."""


class TinyModel:
    """Two layers of width 32, grouped-query attention: `config`, `graphdef`, `params`, and the adapters' geometry."""

    def __init__(self) -> None:
        self.config = ModelConfig.from_dict(HF_CONFIG)
        self.graphdef, params = init_random(self.config, "float32", seed=0)
        # Embeddings of unit variance and kernels of gain 2: the context and every adapter show in the greedy tokens.
        self.params = jax.tree.map(lambda x: x if x.ndim < 2 else x * (2 / (0.02 * math.sqrt(x.shape[0]))), params)
        self.params["embed"]["embedding"] = params["embed"]["embedding"] / 0.02
        config = self.config
        self.geometry = BaseGeometry(
            config.num_layers, config.hidden_size, config.q_width, config.kv_width, config.intermediate_size, PAGE_SIZE
        )

    def settings(self, **changes: object) -> EngineConfig:
        return EngineConfig(**({"dtype": "float32", "page_size": PAGE_SIZE, "progress": False} | SMALL | changes))  # type: ignore[arg-type]

    def engine(self, **changes: object) -> Engine:
        return Engine(self.config, self.graphdef, self.params, self.settings(**changes))

    def save(self, directory: Path) -> Path:
        """Writes the model as Hugging Face does, with a tokenizer."""
        tensors = {}
        for name, placement in tensor_placements(self.config).items():
            array: Any = self.params
            for key in placement.path:
                array = array[key]
            width = placement.shape[0] if placement.transposed else None
            part = np.asarray(array)[..., placement.column :][..., :width]
            tensors[name] = np.ascontiguousarray(part.T if placement.transposed else part)
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(HF_CONFIG))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), bos_token="<s>", eos_token="</s>")
        tokenizer.save_pretrained(directory)
        return directory


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    return TinyModel()


@pytest.fixture(scope="session")
def model_dir(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def dense_logits(model: ModelConfig, params: Params, ids: list[int], adapter: LoraAdapter | None = None) -> np.ndarray:
    """Float64 logits `[len(ids), vocab]` of a plain Llama with the adapter merged into its weights."""
    kernels = _merged(model, params, adapter)
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim
    tokens = len(ids)
    frequency = model.rope.theta ** -(np.arange(0, width, 2) / width)
    angle = np.arange(tokens)[:, None, None] * frequency  # [T, 1, head_dim / 2]

    def norm(x: np.ndarray, scale: jax.Array) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.rms_norm_eps) * np.asarray(scale, np.float64)

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = np.asarray(params["embed"]["embedding"], np.float64)[ids]
    for index in range(model.num_layers):
        layer = params["layers"][index]
        h = norm(x, layer["input_norm"]["scale"]) @ kernels[index, "qkv"]
        q, k, v = np.split(h, (model.q_width, model.q_width + model.kv_width), -1)
        q, k = rotate(q.reshape(tokens, heads, width)), rotate(k.reshape(tokens, kv_heads, width))
        k = np.repeat(k, heads // kv_heads, 1)
        v = np.repeat(v.reshape(tokens, kv_heads, width), heads // kv_heads, 1)
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(width)
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(tokens, -1) @ kernels[index, "o"]
        gate, up = np.split(norm(x, layer["post_attention_norm"]["scale"]) @ kernels[index, "gate_up"], 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ kernels[index, "down"]
    return norm(x, params["norm"]["scale"]) @ np.asarray(params["lm_head"]["kernel"], np.float64)


def _merged(model: ModelConfig, params: Params, adapter: LoraAdapter | None) -> dict[tuple[int, str], np.ndarray]:
    """Every fused kernel `[in, out]`, float64, with `scale * (B A)^T` added to its projections' columns."""
    layers = params["layers"]
    kernels = {
        (index, stack): np.array(layers[index][stack]["kernel"], np.float64)
        for index in range(model.num_layers)
        for stack in ("qkv", "o", "gate_up", "down")
    }
    q, kv, ffn, d = model.q_width, model.kv_width, model.intermediate_size, model.hidden_size
    columns = dict(
        zip(
            PROJECTIONS,
            (
                ("qkv", 0, q),
                ("qkv", q, kv),
                ("qkv", q + kv, kv),
                ("o", 0, d),
                ("gate_up", 0, ffn),
                ("gate_up", ffn, ffn),
                ("down", 0, d),
            ),
            strict=True,
        )
    )
    for (layer, projection), a in (adapter.a if adapter else {}).items():
        stack, first, count = columns[projection]
        delta = adapter.scales[layer, projection] * (adapter.b[layer, projection].astype(np.float64) @ a)  # type: ignore[union-attr]
        kernels[layer, stack][:, first : first + count] += delta.T
    return kernels


@pytest.fixture(scope="session")
def greedy_margin(tiny: TinyModel) -> Callable[..., float]:
    """How far the chosen tokens' reference logits lie below the largest ones, relative to the largest logit: 0 when
    every token is the reference's greedy choice."""

    def margin(prompt: list[int], tokens: list[int], adapter: LoraAdapter | None = None) -> float:
        logits = dense_logits(tiny.config, tiny.params, prompt + tokens[:-1], adapter)[len(prompt) - 1 :]
        chosen = logits[np.arange(len(tokens)), tokens]
        return float(((logits.max(-1) - chosen) / np.abs(logits).max()).max())

    return margin


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the events of every compilation (or load from the persistent cache) from here on."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def assert_idle(engine: Engine) -> None:
    """Nothing is under way, no page leaked, and what adapters hold may be evicted."""
    assert not engine.has_work()
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages["kv"]) == (0, 0, 0)
    assert stats.pages["free"] + stats.idle_adapter_pages == engine.allocator.capacity


@contextmanager
def squeezed(engine: Engine, pages: int) -> Iterator[None]:
    """Leaves the engine only so many free pages (idle adapters are evicted), so that running sequences collide."""
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    held = engine.allocator.allocate(engine.allocator.num_free - pages, PageKind.KV)
    yield
    engine.allocator.free(held)


@pytest.fixture(scope="session")
def squeeze() -> Callable:
    return squeezed


@pytest.fixture(scope="session")
def shared_engine(model_dir: Path, tiny: TinyModel) -> Iterator[Engine]:
    with Engine.from_pretrained(model_dir, tiny.settings()) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine; afterwards nothing may be left of the test's requests and adapters."""
    yield shared_engine
    shared_engine.step()  # a surplus step may be in flight
    unfinished = shared_engine.has_work()
    for request in list(shared_engine._progress):
        shared_engine.cancel(request)
    while shared_engine.has_work():
        shared_engine.step()
    assert_idle(shared_engine)
    for info in shared_engine.adapters():
        assert shared_engine.unload_adapter(info.name)
    assert shared_engine.allocator.num_free == shared_engine.allocator.capacity
    assert not unfinished, "the test left requests behind"
