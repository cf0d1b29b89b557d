"""Adapter uploads beside the steps of the real engine: tokens do not change, no step waits, no page leaks."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from drain import drain

from slora_jax import Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.adapters.spill import SpillFiles
from slora_jax.engine.device import Copy
from slora_jax.memory import PageKind, Upload

NUM_ADAPTERS = 10
TIMEOUT = 20.0  # seconds; only a failing test waits that long
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(tiny) -> Iterator[Engine]:
    """Ten adapters of 6 to 14 pages in a pool of 80, uploaded four pages at a time."""
    with tiny.engine(prefetch=4, upload_pages_per_step=4) as engine:
        for i in range(NUM_ADAPTERS):
            engine.load_adapter(f"a{i}", random_adapter(tiny.geometry, rank=8 + 8 * (i % 2), seed=i))
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    shared.residency.evictor.make_room(shared.allocator.capacity, PageKind.KV)
    yield shared
    for request in list(shared.core.requests):
        shared.cancel(request)
    while shared.has_work():
        shared.step()
    shared.check()
    stats = shared.stats()
    assert (stats.running, stats.waiting, stats.pages.kv, stats.uploads_in_flight) == (0, 0, 0, 0)


def slow_copies(monkeypatch, engine: Engine, steps: int) -> None:
    """Makes every copy appear to end `steps` steps after it was staged."""
    executor = engine.executor
    begun: dict[Copy, int] = {}
    stage, landed, now = executor.stage, executor.landed, itertools.count()
    clock = [0]

    def slow_stage(upload):
        stage(upload)
        begun[executor._staged[-1].copy] = clock[0]

    def slow_landed():
        clock[0] = next(now)
        return landed()

    monkeypatch.setattr(executor, "stage", slow_stage)
    monkeypatch.setattr(executor, "landed", slow_landed)
    monkeypatch.setattr(Copy, "is_there", lambda copy: clock[0] >= begun[copy] + steps)


def traffic(rng: np.random.Generator, requests: int = 40):
    names = [None if i % 6 == 0 else f"a{rng.integers(NUM_ADAPTERS)}" for i in range(requests)]
    prompts = [rng.integers(2, 250, rng.integers(3, 30)).tolist() for _ in names]
    return prompts, [replace(SHORT, max_tokens=int(rng.integers(2, 14))) for _ in names], names


@pytest.mark.parametrize("copy_steps", [0, 6])
def test_tokens_are_the_same_with_and_without_prefetch_and_nothing_compiles(
    engine, rng, monkeypatch, compilations, copy_steps
) -> None:
    batch = traffic(rng)
    before = engine.stats()
    slow_copies(monkeypatch, engine, copy_steps)
    engine.step()
    compilations.clear()
    ahead = engine.generate(*batch)
    assert not compilations
    after = engine.stats()
    assert after.adapter_loads - before.adapter_loads >= NUM_ADAPTERS
    assert after.prefetches_wasted - before.prefetches_wasted <= 2
    monkeypatch.setattr(engine.scheduler, "config", replace(engine.scheduler.config, prefetch=0))
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    assert [o.token_ids for o in engine.generate(*batch)] == [o.token_ids for o in ahead]
    assert engine.stats().prefetch_hits == after.prefetch_hits


def test_prefetched_adapter_is_ready_when_a_slot_becomes_free(engine, monkeypatch) -> None:
    slow_copies(monkeypatch, engine, 1)
    running = [engine.add_request([5, 6, 7], LONG) for _ in range(4)]
    engine.step()
    before = engine.stats()
    waiting = engine.add_request([5, 6, 7], SHORT, "a0")
    engine.step()
    during = engine.stats()
    assert during.uploads_in_flight == 1
    assert during.upload_bytes_in_flight == 4 * engine.executor.page_bytes  # one step's pages
    for _ in range(8):
        engine.step()
    assert engine.stats().uploads_in_flight == engine.stats().upload_bytes_in_flight == 0
    engine.cancel(running[0])
    engine.step()
    assert engine.core.requests[waiting].status == "running"
    assert engine.stats().prefetch_hits == before.prefetch_hits + 1


def test_tokens_are_those_of_merged_weights_while_pages_land_in_parts(engine, tiny, greedy_margin, monkeypatch) -> None:
    slow_copies(monkeypatch, engine, 3)
    prompts = [[7 + i, 8, 9] * 3 for i in range(NUM_ADAPTERS)]
    outputs = engine.generate(prompts, LONG, [f"a{i}" for i in range(NUM_ADAPTERS)])
    for i, output in enumerate(outputs):
        adapter = random_adapter(tiny.geometry, rank=8 + 8 * (i % 2), seed=i)
        assert greedy_margin(prompts[i], output.token_ids, adapter) < 1e-5


def test_steps_continue_while_an_adapter_is_read_and_copied(six, monkeypatch) -> None:
    """The running request gets a token in every step: while the disk blocks, and during the eight steps of a copy."""
    engine, blocked, read = six.engine, threading.Event(), SpillFiles.read
    six.load(six.names)
    slow_copies(monkeypatch, engine, 8)
    monkeypatch.setattr(SpillFiles, "read", lambda files, spilled: blocked.wait(TIMEOUT) and read(files, spilled))
    running = engine.add_request([5, 6, 7], SamplingParams(max_tokens=80, ignore_eos=True))
    for _ in range(2):
        engine.step()
    waiting = engine.add_request(six.prompt, six.params, "a")
    tokens: dict[str, list[int]] = {running: [], waiting: []}
    outputs = {}

    def step(number: int) -> None:
        for delta in engine.step():
            tokens[delta.request_id].append(number)
            if delta.output is not None:
                outputs[delta.request_id] = delta.output

    with engine.trace() as trace:
        for number in range(20):
            step(number)
        blocked.set()
        engine.store.wait(six.digest("a"), TIMEOUT)
        for number in range(20, 60):
            step(number)
    assert tokens[running] == list(range(60))
    assert 28 <= tokens[waiting][0] < 40
    assert outputs[waiting].token_ids == six.expected["a"]
    events = [e for e in trace.events() if e["ph"] == "X"]
    (upload,) = [e for e in events if e["name"] == "a" and "before_steps" in e["args"]]
    during = [e for e in events if e["name"] == "step" and upload["ts"] < e["ts"] < upload["ts"] + upload["dur"]]
    assert len(during) >= 7
    in_flight = [e["args"]["bytes"] for e in trace.events() if e["name"].startswith("uploads in flight")]
    assert max(in_flight) > 0 == in_flight[-1]
    engine.cancel(running)


@pytest.mark.parametrize("where", ["stage", "copy"])
def test_a_copy_that_fails_ends_its_own_requests_only(engine, monkeypatch, where) -> None:
    prompts, names = [[5, 6, 7]] * 4, ["a1", "a2", None, "a3"]
    expected = engine.generate(prompts, LONG, names)
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    bad = engine.store.resolve("a2")
    with monkeypatch.context() as patch:
        if where == "stage":
            stage = engine.executor.stage

            def failing(upload):
                if upload.resident.digest == bad and upload.first:  # its first pages were staged
                    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
                stage(upload)

            patch.setattr(engine.executor, "stage", failing)
        else:
            move = engine.executor._move

            def failing(upload, copy):
                if upload.resident.digest != bad:
                    return move(upload, copy)
                return "RESOURCE_EXHAUSTED: out of memory"

            patch.setattr(engine.executor, "_move", failing)
        outputs = engine.generate(prompts, LONG, names)
    for name, output, good in zip(names, outputs, expected, strict=True):
        if name == "a2":
            assert (output.finish_reason, output.token_ids) == ("error", [])
            assert f"content {bad[:12]} could not be copied to the device" in output.error
            assert "RESOURCE_EXHAUSTED" in output.error
        else:
            assert output.token_ids == good.token_ids
    assert bad not in engine.residency
    assert engine.generate([[5, 6, 7]], LONG, "a2")[0].token_ids == expected[1].token_ids


def test_failed_copy_is_reported_before_the_pool_is_written(engine) -> None:
    class Failed(Copy):
        def wait(self):
            raise RuntimeError("INTERNAL: the copy failed")

    resident = engine.residency.prefetch("x", np.ones(7, np.int32), 2, 1, protect_awaited=False)
    (upload,) = engine.residency.uploads(2)
    pool = engine.executor.device.pool
    assert "INTERNAL" in engine.executor._move(upload, Failed([]))
    assert engine.executor.device.pool is pool
    engine.residency.drop(resident.digest)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_unload_or_cancel_while_in_flight(engine, tiny, monkeypatch, after) -> None:
    slow_copies(monkeypatch, engine, 2)
    engine.load_adapter("x", random_adapter(tiny.geometry, 16, seed=77))
    digest = engine.store.resolve("x")
    running = engine.add_request([5, 6, 7], LONG)
    engine.step()
    waiting = engine.add_request([5, 6, 7], SHORT, "x")
    for _ in range(after):
        engine.step()
    assert not engine.unload_adapter("x"), "a request waits for it"
    free = engine.allocator.num_free
    held = engine.residency.find(digest)
    engine.cancel(waiting)
    assert digest not in engine.residency
    assert held is None or engine.allocator.num_free >= free + held.num_pages
    outputs = drain(engine)
    assert (outputs[waiting].finish_reason, outputs[running].finish_reason) == ("cancelled", "length")
    assert engine.executor.pages_in_flight == 0 and not engine.executor._tiles


def test_staged_pages_of_an_evicted_adapter_are_never_written(engine) -> None:
    """Its pages belong to other sequences by then."""
    running = engine.add_request([5, 6, 7], LONG)
    engine.step()
    engine.add_request([9], SHORT, "a1")
    engine.step()
    resident = engine.residency.find(engine.store.resolve("a1"))
    assert resident.staged > resident.landed and engine.executor.pages_in_flight
    engine.residency.drop(resident.digest)
    taken = engine.allocator.allocate(engine.allocator.num_free, PageKind.KV)
    before = [np.asarray(layer)[taken] for layer in engine.executor.device.pool]
    engine.executor.wait(None)
    assert [landing.error for landing in engine.executor.landed()] == [None]
    engine.residency.landed(Upload(resident, 0, resident.staged))
    for layer, old in zip(engine.executor.device.pool, before, strict=True):
        np.testing.assert_array_equal(np.asarray(layer)[taken], old)
    engine.allocator.free(taken)
    assert engine.cancel(running)


def test_jax_arrays_have_is_ready() -> None:
    """JAX does not document it."""
    assert jax.block_until_ready(jax.device_put(np.ones(3))).is_ready() is True
