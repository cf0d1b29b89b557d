"""Ten thousand registered adapters, a tenth of them in host memory, about fifty in the pool: requests by Zipf's law."""

import gc
import time

import numpy as np
import pytest
from tiny_model import MEDIUM

from slora_jax import AdapterError, SamplingParams
from slora_jax.adapters import AdapterTiles, random_adapter

NUM_ADAPTERS = 10_000
NBYTES = 4096
HOST_ADAPTERS = 1000
REQUESTS = 1500
SAMPLE = 120  # outputs compared with merged weights


def weights(tiny, number: int):
    return random_adapter(tiny.geometry, 4, targets=("q", "v"), seed=number, scale_of_b=1.0)


def tiles_in_memory() -> int:
    """Adapters whose tiles something still refers to, whatever the store counts."""
    return sum(type(thing) is AdapterTiles for thing in gc.get_objects())


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    spill_dir = tmp_path_factory.mktemp("ten-thousand")
    settings = {"host_adapter_bytes": HOST_ADAPTERS * NBYTES, "spill_dir": spill_dir}
    with tiny.engine(**MEDIUM, **settings) as engine:
        yield engine
    assert list(spill_dir.iterdir()) == []


def test_ten_thousand_adapters_are_served_from_a_pool_of_fifty(tiny, engine, greedy_margin, rng) -> None:
    others, begin = tiles_in_memory(), time.perf_counter()
    for number in range(NUM_ADAPTERS):
        info = engine.load_adapter(f"adapter-{number}", weights(tiny, number))
        assert info.nbytes == NBYTES
        assert engine.store.stats().resident_bytes <= HOST_ADAPTERS * NBYTES
    print(f"registered in {time.perf_counter() - begin:.1f} s")
    assert tiles_in_memory() - others == HOST_ADAPTERS
    assert engine.store.stats().spilled == NUM_ADAPTERS - HOST_ADAPTERS
    assert engine.stats().registered_adapters == NUM_ADAPTERS

    popularity = 1 / np.arange(1, NUM_ADAPTERS + 1)
    wanted = rng.permutation(NUM_ADAPTERS)[rng.choice(NUM_ADAPTERS, REQUESTS, p=popularity / popularity.sum())].tolist()
    served = set(wanted)
    adapter_of, outputs, resident, host = {}, {}, [], []
    begin = time.perf_counter()
    while wanted or engine.has_work():
        for _ in range(min(len(wanted), rng.poisson(4))):
            params = SamplingParams(max_tokens=int(rng.integers(1, 8)), ignore_eos=True)
            prompt, number = rng.integers(2, 300, rng.integers(1, 16)).tolist(), wanted.pop()
            adapter_of[engine.add_request(prompt, params, f"adapter-{number}")] = number
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
        resident.append(engine.stats().resident_adapters)
        host.append(engine.store.stats().resident_bytes)
        if len(resident) % 50 == 0:
            engine.check()
    print(f"{REQUESTS} requests for {len(served)} adapters in {time.perf_counter() - begin:.1f} s; at most "
          f"{max(resident)} in the pool; {engine.stats()}; {engine.store.stats()}")  # fmt: skip

    assert 45 <= max(resident) <= 79
    assert max(host) < 1.1 * HOST_ADAPTERS * NBYTES, "the budget is exceeded by what is being read only"
    assert tiles_in_memory() - others <= HOST_ADAPTERS + 1
    stats = engine.stats()
    assert stats.adapter_loads > len(served) and stats.adapter_evictions > 500 and stats.adapter_hits > 300
    assert engine.store.stats().spill_reads > 400
    assert outputs.keys() == adapter_of.keys()
    assert {output.finish_reason for output in outputs.values()} == {"length"}
    for request in rng.choice(sorted(outputs), SAMPLE, replace=False):
        output = outputs[request]
        margin = greedy_margin(output.prompt_token_ids, output.token_ids, weights(tiny, adapter_of[request]))
        assert margin < 1e-5, request

    with pytest.raises(AdapterError, match="unknown adapter 'adapter-12345'; did you mean 'adapter-"):
        engine.add_request([1], None, "adapter-12345")
    begin = time.perf_counter()
    for number in range(NUM_ADAPTERS):
        assert engine.unload_adapter(f"adapter-{number}")
    print(f"unloaded in {time.perf_counter() - begin:.1f} s")
    assert engine.allocator.num_free == engine.allocator.capacity
    store = engine.store.stats()
    assert (store.registered, store.resident_bytes, store.spilled) == (0, 0, 0)
