"""Keys and values of one byte: an engine with adapters, chunked prompts, prefix hits, preemption and evictions gives
repeatable tokens, equal alone and together, and logits within the format's rounding of float32's."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from dense_reference import dense_logits
from tiny_model import TinyModel, one_start_at_a_time

from slora_jax import Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.models import Params

ROUNDING = {"fp8": 0.1, "int8": 0.02}
"""Bound of the mean square root of the logits' errors, relative to that of the logits."""

RANKS = {"q": 4, "v": 9, "gate": 3, "down": 4}
PROMPTS = [[*range(30, 30 + n)] for n in (20, 37, 5)] * 3
ADAPTERS = [*"aaabbbccc"]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def calm(tiny: TinyModel) -> Params:
    """The tiny model with kernels of half the gain: its tokens do not depend on the last bits of keys and values."""
    return tiny.params | {"layers": jax.tree.map(lambda x: x / 2 if x.ndim == 2 else x, tiny.params["layers"])}


@pytest.fixture(scope="module", params=[("fp8", 1), ("int8", 2)], ids=["fp8", "int8_over_two_devices"])
def narrow(request: pytest.FixtureRequest, tiny: TinyModel, calm: Params) -> Iterator[Engine]:
    """An engine with room for two of the three adapters beside three short sequences."""
    kv_dtype, devices = request.param
    changes = {"kv_dtype": kv_dtype, "tensor_parallel_size": devices, "page_size": 16, "num_pages": 29}
    changes |= {"compile_ahead": False, "keep_logits": True}
    with one_start_at_a_time():
        engine = Engine(tiny.config, tiny.graphdef, calm, tiny.settings(**changes))
    with engine:
        for name in "abc":
            engine.load_adapter(name, _adapter(engine, name))
        yield engine


def _adapter(engine: Engine, name: str):
    return random_adapter(engine.store.geometry, RANKS, seed=ord(name))


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_tokens_alone_and_together_and_logits_near_the_reference(narrow: Engine, tiny: TinyModel, calm: Params) -> None:
    before = narrow.stats()
    together = narrow.generate(PROMPTS, PARAMS, ADAPTERS)
    stats = narrow.stats()
    print("together", stats)
    errors, changes = [], []
    for prompt, name, output in zip(PROMPTS, ADAPTERS, together, strict=True):
        tokens = prompt + output.token_ids[:-1]
        exact, base = (
            dense_logits(tiny.config, calm, tokens, adapter)[len(prompt) - 1 :]
            for adapter in (_adapter(narrow, name), None)
        )
        errors.append(_root_mean_square(np.array(output.logits) - exact) / _root_mean_square(exact))
        changes.append(_root_mean_square(base - exact) / _root_mean_square(exact))
    print("errors", errors, "changes by the adapters", changes)
    assert max(errors) < ROUNDING[narrow.config.kv_dtype] < min(changes)
    for prompt, name, output in zip(PROMPTS, ADAPTERS, together, strict=True):
        (alone,) = narrow.generate([prompt], PARAMS, [name])
        assert alone.token_ids == output.token_ids
    assert stats.preemptions > before.preemptions, "the pool is too large to force preemption"
    assert stats.adapter_evictions > before.adapter_evictions, "the pool is too large to force evictions"
    assert narrow.stats().prefix_hit_tokens > stats.prefix_hit_tokens, "no prefix was shared"
    narrow.check()
