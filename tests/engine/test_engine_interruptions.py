"""Cancellation, Ctrl-C, adapters that come, go, break and are lost: nothing leaks, other requests are not touched."""

import itertools
import signal
from dataclasses import replace
from functools import partial

import pytest

from slora_jax import AdapterError, Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.errors import ProcessLostError
from slora_jax.memory import PageKind

LONG = SamplingParams(max_tokens=24, ignore_eos=True)
PROMPT = list(range(30, 60))  # two chunks of prefill


def drain(engine: Engine) -> dict:
    """Runs to the end; request id -> output."""
    outputs = {}
    while engine.has_work():
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
    return outputs


# Cancellation


@pytest.mark.parametrize("steps", range(6))
def test_cancel_frees_pages_at_once_and_the_next_step_reports_it(engine, tiny, steps) -> None:
    """Waiting after 0 steps, in prefill after 1, its first token in flight after 2, then decoding."""
    engine.load_adapter("a", random_adapter(tiny.geometry, 4))
    request = engine.add_request(PROMPT, LONG, "a")
    streamed = [token for _ in range(steps) for delta in engine.step() for token in delta.token_ids]
    assert engine.cancel(request)
    assert engine.stats().pages.kv == 0 and engine.stats().running == engine.stats().waiting == 0
    engine.check()
    deltas = engine.step()
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [(request, "cancelled")]
    assert deltas[0].output.token_ids == streamed
    assert not engine.cancel(request)
    assert drain(engine) == {}


def test_cancel_does_not_change_the_others(engine) -> None:
    alone = engine.generate([PROMPT], LONG)[0].token_ids
    for steps in range(5):
        keep = engine.add_request(PROMPT, LONG)
        drop = [engine.add_request([9] * n, LONG) for n in (3, 20)]
        for _ in range(steps):
            engine.step()
        for request in drop:
            engine.cancel(request)
        refill = engine.add_request([8] * 11, LONG)  # takes over the freed pages and slot
        outputs = drain(engine)
        assert outputs[keep].token_ids == alone
        assert outputs[refill].finish_reason == "length"


def test_id_of_a_cancelled_request_can_be_used_at_once(engine) -> None:
    expected = engine.generate([[7, 7]], LONG)[0]
    engine.add_request(PROMPT, LONG, request_id="x")
    for _ in range(3):
        engine.step()
    engine.cancel("x")  # with a token in flight, which must not be taken for the next request's
    engine.add_request([7, 7], LONG, request_id="x")
    cancelled, *deltas = [delta for _ in range(40) for delta in engine.step()]
    assert cancelled.finish_reason == "cancelled"
    assert [token for delta in deltas for token in delta.token_ids] == expected.token_ids
    assert deltas[-1].output.token_ids == expected.token_ids and deltas[-1].output.text == expected.text


# Ctrl-C and failures within a step


def before_call(monkeypatch, owner: object, name: str, number: int, action) -> None:
    """Runs `action` before the given call of a method, once."""
    original, calls = getattr(owner, name), itertools.count()

    def patched(*args, **kwargs):
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)


def raise_(error: BaseException) -> None:
    raise error


@pytest.fixture
def four_adapters(engine, tiny):
    """Arguments of `generate`, and the tokens it gives; the adapters are out of the pool again."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        engine.load_adapter(name, random_adapter(tiny.geometry, 4, seed=seed))
    batch = [PROMPT, [5], [6] * 20, [7] * 9], LONG, ["a", "b", "c", "d"]
    expected = [output.token_ids for output in engine.generate(*batch)]
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    return batch, expected


@pytest.fixture
def prefetch(engine, name):
    """Uploads before the step exist only without prefetch."""
    config = engine.scheduler.config
    engine.scheduler.config = replace(config, prefetch=0 if name.endswith("upload") else config.prefetch)
    yield
    engine.scheduler.config = config


WITHIN_A_STEP = [
    ("scheduler", "schedule"),
    ("executor", "landed"),
    ("executor", "stage"),
    ("executor", "upload"),
    ("executor", "dispatch"),
    ("store", "release"),
]


@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize(("owner", "name"), WITHIN_A_STEP)
def test_ctrl_c_leaves_an_engine_that_answers_as_before(
    engine, four_adapters, prefetch, monkeypatch, owner, name, call
) -> None:
    batch, expected = four_adapters
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, getattr(engine, owner), name, call, interrupt)
        engine.generate(*batch)
    assert_nothing_left(engine)
    assert [output.token_ids for output in engine.generate(*batch)] == expected


FAILURES = [
    (name, error)
    for name in ("step", "executor.landed", "executor.stage", "executor.upload", "executor.dispatch")
    for error in (KeyboardInterrupt(), RuntimeError("out of device memory"))
    if name != "executor.stage" or not isinstance(error, Exception)  # which ends an adapter's requests: test_uploads.py
]


@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize(("name", "error"), FAILURES, ids=repr)
def test_failure_within_a_step_leaves_an_engine_that_answers_as_before(
    engine, four_adapters, prefetch, monkeypatch, name, call, error
) -> None:
    """An adapter whose upload failed must not be taken for resident."""
    batch, expected = four_adapters
    owner = engine.executor if "." in name else engine
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        before_call(patch, owner, name.split(".")[-1], call, partial(raise_, error))
        engine.generate(*batch)
    assert_nothing_left(engine)
    assert [output.token_ids for output in engine.generate(*batch)] == expected


def assert_nothing_left(engine: Engine) -> None:
    assert not engine.has_work()
    assert (engine.stats().running, engine.stats().waiting, engine.stats().pages.kv) == (0, 0, 0)
    engine.check()


@pytest.mark.parametrize(("owner", "name"), WITHIN_A_STEP[:-1])
def test_loop_over_step_that_was_interrupted_goes_on_where_it_was(
    engine, tiny, prefetch, monkeypatch, owner, name
) -> None:
    """As in a notebook: the cell that calls `step` is interrupted, and run again. No token is lost."""
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    expected = engine.generate([PROMPT], LONG, "a")[0].token_ids
    for call in (0, 1, 2, 7, 24):
        engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
        engine.add_request(PROMPT, LONG, "a")
        tokens, interrupts = [], 0
        with monkeypatch.context() as patch:
            before_call(patch, getattr(engine, owner), name, call, partial(signal.raise_signal, signal.SIGINT))
            while engine.has_work():
                try:
                    tokens += [token for delta in engine.step() for token in delta.token_ids]
                except KeyboardInterrupt:
                    interrupts += 1
        assert tokens == expected
        assert interrupts == (call == 0 or name not in ("upload", "stage"))


def test_request_of_a_step_that_failed_ends_with_the_reason_and_others_go_on(engine, tiny, monkeypatch) -> None:
    expected = engine.generate([PROMPT], LONG)[0].token_ids
    with monkeypatch.context() as patch:
        before_call(patch, engine.executor, "dispatch", 0, partial(raise_, RuntimeError("no memory")))
        failed = engine.add_request([5, 6], LONG)
        with pytest.raises(RuntimeError):
            engine.step()
        request = engine.add_request(PROMPT, LONG)
        outputs = drain(engine)
    assert (outputs[failed].finish_reason, outputs[failed].token_ids) == ("error", [])
    assert "no memory" in outputs[failed].error
    assert outputs[request].token_ids == expected


# Adapters that come and go


def test_bad_adapter_disturbs_nobody(engine, tiny, tmp_path) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    expected = engine.generate([PROMPT], LONG, "a")[0].token_ids
    request = engine.add_request(PROMPT, LONG, "a")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    for step in range(6):
        engine.step()
        with pytest.raises(AdapterError):
            engine.load_adapter("a" if step % 2 else "new", tmp_path)
    assert drain(engine)[request].token_ids == expected
    assert [info.name for info in engine.adapters()] == ["a"]


@pytest.mark.parametrize("steps", range(5))
def test_requests_under_way_keep_the_weights_they_arrived_with(engine, tiny, steps) -> None:
    old, new = (random_adapter(tiny.geometry, rank, seed=rank) for rank in (4, 7))
    expected = {}
    for name, adapter in (("old", old), ("new", new)):
        engine.load_adapter(name, adapter)
        expected[name] = engine.generate([PROMPT], LONG, name)[0].token_ids
        assert engine.unload_adapter(name)
    assert expected["old"] != expected["new"]

    engine.load_adapter("x", old)
    before = engine.add_request(PROMPT, LONG, "x")
    for _ in range(steps):
        engine.step()
    engine.load_adapter("x", new)
    after = engine.add_request(PROMPT, LONG, "x")
    for _ in range(2):
        engine.step()
    assert not engine.unload_adapter("x"), "requests use it"
    with pytest.raises(AdapterError):
        engine.add_request(PROMPT, LONG, "x")
    outputs = drain(engine)
    assert outputs[before].token_ids == expected["old"]
    assert outputs[after].token_ids == expected["new"]
    assert engine.allocator.num_free == engine.allocator.capacity, "both contents went with their last requests"


def test_content_with_two_names_stays_until_both_are_gone(engine, tiny) -> None:
    adapter = random_adapter(tiny.geometry, 4)
    assert engine.load_adapter("a", adapter).digest == engine.load_adapter("b", adapter).digest
    engine.generate([PROMPT], LONG, "a")
    assert engine.stats().resident_adapters == 1
    assert not engine.unload_adapter("a")
    assert engine.stats().resident_adapters == 1
    assert engine.unload_adapter("b")
    assert engine.allocator.num_free == engine.allocator.capacity


# Adapters on disk


@pytest.fixture
def spilling_engine(tiny, tmp_path):
    """Holds one adapter of rank 4 in host memory; the others are on disk."""
    size = 12_000
    with tiny.engine(host_adapter_bytes=size, spill_dir=tmp_path / "spill") as engine:
        for seed in range(6):
            info = engine.load_adapter(f"a{seed}", random_adapter(tiny.geometry, {"q": 4, "down": 4}, seed=seed))
        assert size / 2 < info.nbytes < size
        yield engine


def test_spilled_adapters_serve_the_right_tokens(spilling_engine, tiny, greedy_margin) -> None:
    engine = spilling_engine
    assert engine.store.stats().spilled == 5
    for _ in range(2):
        engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
        outputs = engine.generate([PROMPT] * 6, LONG, [f"a{seed}" for seed in range(6)])
        assert len({tuple(output.token_ids) for output in outputs}) == 6
        for seed, output in enumerate(outputs):
            adapter = random_adapter(tiny.geometry, {"q": 4, "down": 4}, seed=seed)
            assert greedy_margin(PROMPT, output.token_ids, adapter) < 1e-5
    assert engine.store.stats().spill_reads >= 5


def test_lost_adapter_ends_its_own_requests_only_and_can_be_loaded_again(spilling_engine, tiny, tmp_path) -> None:
    engine = spilling_engine
    expected = engine.generate([PROMPT] * 6, LONG, [f"a{seed}" for seed in range(6)])
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    lost = engine.store.resolve("a2")
    (file,) = (tmp_path / "spill").glob(f"**/{lost[:16]}*.tiles")
    file.write_bytes(b"")
    outputs = engine.generate([PROMPT] * 6, LONG, [f"a{seed}" for seed in range(6)])
    for seed, output in enumerate(outputs):
        if seed == 2:
            assert (output.finish_reason, output.token_ids) == ("error", [])
            assert lost[:12] in output.error
        else:
            assert output.finish_reason == "length" and output.token_ids == expected[seed].token_ids
    engine.check()
    engine.load_adapter("a2", random_adapter(tiny.geometry, {"q": 4, "down": 4}, seed=2))
    assert engine.generate([PROMPT], LONG, "a2")[0].token_ids == expected[2].token_ids


def test_closed_engine_holds_nothing(tiny, tmp_path) -> None:
    with tiny.engine(spill_dir=tmp_path / "spill") as engine:
        engine.load_adapter("a", random_adapter(tiny.geometry, 4))
        engine.add_request(PROMPT, LONG, "a")
        for _ in range(3):
            engine.step()
    assert not engine.has_work() and engine.stats().pages.kv == 0
    assert not list(tmp_path.glob("spill/**/*.tiles"))


def test_a_request_whose_output_cannot_be_made_ends_with_the_reason_and_others_go_on(engine, monkeypatch) -> None:
    expected = engine.generate([PROMPT], LONG)[0].token_ids
    delta = engine._outputs.delta
    with monkeypatch.context() as patch:
        bad = engine.add_request([5, 6], LONG)
        good = engine.add_request(PROMPT, LONG)

        def failing(update):
            if update.request.id == bad and len(update.request.output) == 2:
                raise RuntimeError("no such bytes")
            return delta(update)

        patch.setattr(engine._outputs, "delta", failing)
        outputs = drain(engine)
    assert outputs[bad].finish_reason == "error" and "no such bytes" in outputs[bad].error
    assert outputs[good].token_ids == expected
    assert_nothing_left(engine)


def test_requests_of_a_lost_device_are_not_left_unfinished(engine, monkeypatch) -> None:
    """As when another process is lost: the next call meets the same error again."""
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.executor), "is_lost", True)
        before_call(patch, engine.executor, "dispatch", 0, partial(raise_, ProcessLostError("process 1 is lost")))
        with pytest.raises(ProcessLostError):
            engine.generate([PROMPT], LONG)
    assert_nothing_left(engine)
    assert engine.generate([PROMPT], LONG)[0].finish_reason == "length"
