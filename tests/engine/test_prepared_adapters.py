"""Adapters are prepared on other threads while the engine steps, and published between two steps."""

import queue
import threading

import pytest
from drain import drain

from slora_jax import AdapterError, SamplingParams
from slora_jax.adapters import random_adapter, store, write_peft

LONG = SamplingParams(max_tokens=24, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
TIMEOUT = 20.0  # seconds; only a failing test waits that long


def test_steps_go_on_while_an_adapter_is_prepared(engine, tiny, monkeypatch, greedy_margin) -> None:
    """A preparation that blocks holds no lock that a step needs."""
    adapter, begun, gate = random_adapter(tiny.geometry, 4, seed=1), threading.Event(), threading.Event()
    pack, results = store.pack_tiles, []

    def hang(*args):
        begun.set()
        assert gate.wait(TIMEOUT)
        return pack(*args)

    monkeypatch.setattr(store, "pack_tiles", hang)
    thread = threading.Thread(target=lambda: results.append(engine.prepare_adapter("x", adapter)))
    thread.start()
    assert begun.wait(TIMEOUT)
    running = engine.add_request([5, 6, 7], LONG)
    assert len(drain(engine)[running].token_ids) == 24
    with pytest.raises(AdapterError, match="unknown adapter 'x'"):
        engine.add_request([5], LONG, "x")
    gate.set()
    thread.join()
    assert engine.adapters() == []
    engine.publish_adapter(results[0])
    output = drain_one(engine, "x")
    assert greedy_margin([5, 6, 7], output.token_ids, adapter) < 1e-5


def drain_one(engine, name, params=LONG):
    request = engine.add_request([5, 6, 7], params, name)
    return drain(engine)[request]


def test_threads_prepare_while_the_engine_steps_and_publishes(six, tiny, greedy_margin, tmp_path) -> None:
    """Host memory holds one adapter, so each registration spills another one."""
    engine, count = six.engine, 4
    weights = {f"t{thread}-{i}": six.weights(chr(200 + 20 * thread + i)) for thread in range(3) for i in range(count)}
    directories = {name: write_peft(tmp_path / name, adapter) for name, adapter in weights.items()}
    ready: queue.SimpleQueue = queue.SimpleQueue()

    def prepare(thread: int) -> None:
        for i in range(count):
            name = f"t{thread}-{i}"
            prepared = engine.prepare_adapter(name, directories[name])
            if i % 4 == 3:
                engine.discard_adapter(prepared)
            ready.put(prepared if i % 4 != 3 else None)

    threads = [threading.Thread(target=prepare, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    requests, outputs, seen = {}, {}, 0
    while seen < 3 * count or engine.has_work():
        while not ready.empty():
            prepared, seen = ready.get(), seen + 1
            if prepared is not None:
                name = engine.publish_adapter(prepared).name
                requests[engine.add_request([5, 6, 7], SHORT, name)] = name
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
    for thread in threads:
        thread.join()
    engine.check()
    assert sorted(requests.values()) == sorted(info.name for info in engine.adapters()) and len(requests) == 9
    for request, name in requests.items():
        assert outputs[request].finish_reason == "length"
        assert greedy_margin([5, 6, 7], outputs[request].token_ids, weights[name]) < 1e-5, name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_requests_keep_the_weights_that_their_name_had_on_arrival(engine, tiny, greedy_margin, order) -> None:
    weights = [random_adapter(tiny.geometry, 4, seed=seed) for seed in range(3)]
    prepared = [engine.prepare_adapter("x", adapter) for adapter in weights[:2]]
    engine.load_adapter("x", weights[2])
    requests = {engine.add_request([5, 6, 7], LONG, "x"): weights[2]}
    for index in order:
        engine.step()
        engine.step()
        assert engine.publish_adapter(prepared[index]).digest == weights[index].digest
        requests[engine.add_request([5, 6, 7], LONG, "x")] = weights[index]
    outputs = drain(engine)
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 3
    for request, adapter in requests.items():
        assert greedy_margin([5, 6, 7], outputs[request].token_ids, adapter) < 1e-5
    assert list(engine.store.tiers()) == [weights[order[1]].digest], "the others were dropped with their last requests"


def test_publishing_over_an_idle_name_frees_its_pages(engine, tiny) -> None:
    weights = [random_adapter(tiny.geometry, 4, seed=seed) for seed in range(2)]
    engine.load_adapter("x", weights[0])
    drain_one(engine, "x")
    assert engine.stats().pages.adapter > 0
    prepared = engine.prepare_adapter("x", weights[1])
    assert engine.stats().pages.adapter > 0
    engine.publish_adapter(prepared)
    assert engine.stats().pages.adapter == 0


def test_unloaded_and_discarded_while_prepared_for_another_name(engine, tiny, greedy_margin) -> None:
    """The pages are freed with the name, the content with its last holder."""
    adapter = random_adapter(tiny.geometry, 4, seed=3)
    engine.load_adapter("x", adapter)
    drain_one(engine, "x")
    prepared = engine.prepare_adapter("y", adapter)
    assert not engine.unload_adapter("x"), "y's preparation holds it"
    assert engine.stats().pages.adapter == 0
    again = engine.prepare_adapter("y", adapter)
    engine.discard_adapter(prepared)
    engine.publish_adapter(again)
    assert greedy_margin([5, 6, 7], drain_one(engine, "y").token_ids, adapter) < 1e-5
    assert engine.unload_adapter("y")
    assert engine.store.tiers() == {}
