"""Cancellation, Ctrl-C, failed steps, adapters loaded and unloaded under requests: no page leaks, other requests keep
their tokens."""

import itertools
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest
from drain import drain

from slora_jax import AdapterError, Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.adapters.spill import SpillFiles
from slora_jax.errors import ProcessLostError
from slora_jax.memory import PageKind

LONG = SamplingParams(max_tokens=24, ignore_eos=True)
PROMPT = list(range(30, 60))  # two chunks of prefill
TIMEOUT = 20.0  # seconds; only a failing test waits that long


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


def test_cancelling_does_not_change_other_requests(engine) -> None:
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
    engine.cancel("x")  # its token in flight must not go to the next request with this id
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
    """Arguments of `generate` and the expected tokens. The adapters are registered and not in the pool."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        engine.load_adapter(name, random_adapter(tiny.geometry, 4, seed=seed))
    batch = [PROMPT, [5], [6] * 20, [7] * 9], LONG, ["a", "b", "c", "d"]
    expected = [output.token_ids for output in engine.generate(*batch)]
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    return batch, expected


@pytest.fixture
def prefetch(engine, name):
    """Turns prefetch off where `name` is `upload`, which only happens without it."""
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


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize(("owner", "name"), WITHIN_A_STEP)
def test_engine_answers_as_before_after_ctrl_c(engine, four_adapters, prefetch, monkeypatch, owner, name, call) -> None:
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


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize(("name", "error"), FAILURES, ids=repr)
def test_engine_answers_as_before_after_a_failed_step(
    engine, four_adapters, prefetch, monkeypatch, name, call, error
) -> None:
    """An adapter whose upload failed is not resident."""
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
def test_interrupted_loop_over_step_continues_without_losing_a_token(
    engine, tiny, prefetch, monkeypatch, owner, name
) -> None:
    """In a notebook, the cell that calls `step` is interrupted and run again."""
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


@pytest.mark.parametrize(
    ("call", "owner", "name"),
    [("add", "store", "acquire"), ("add", "scheduler", "add"), ("cancel", "scheduler", "finish"),
     ("cancel", "store", "release"), ("unload", "store", "remove")],
)  # fmt: skip
def test_ctrl_c_within_another_call_takes_effect_after_it(engine, tiny, monkeypatch, call, owner, name) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    if call == "cancel":
        engine.add_request(PROMPT, LONG, "a", request_id="x")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, getattr(engine, owner), name, 0, partial(signal.raise_signal, signal.SIGINT))
        if call == "add":
            engine.add_request(PROMPT, LONG, "a", request_id="x")
        elif call == "cancel":
            engine.cancel("x")
        else:
            engine.unload_adapter("a")
    assert list(engine.core.requests) == (["x"] if call == "add" else [])
    assert len(engine.adapters()) == (call != "unload")
    assert {output.finish_reason for output in drain(engine).values()} == {
        "add": {"length"}, "cancel": {"cancelled"}, "unload": set()
    }[call]  # fmt: skip


def test_requests_of_a_failed_step_end_with_the_reason_and_others_continue(engine, tiny, monkeypatch) -> None:
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


# Adapters loaded and unloaded under requests


def test_refused_adapter_does_not_change_running_requests(engine, tiny, tmp_path) -> None:
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
def test_running_requests_keep_the_weights_they_arrived_with(engine, tiny, steps) -> None:
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
    assert engine.allocator.num_free == engine.allocator.capacity, "both contents were dropped with their last requests"


def test_content_with_two_names_stays_until_both_are_unloaded(engine, tiny) -> None:
    adapter = random_adapter(tiny.geometry, 4)
    assert engine.load_adapter("a", adapter).digest == engine.load_adapter("b", adapter).digest
    engine.generate([PROMPT], LONG, "a")
    assert engine.stats().resident_adapters == 1
    assert not engine.unload_adapter("a")
    assert engine.stats().resident_adapters == 1
    assert engine.unload_adapter("b")
    assert engine.allocator.num_free == engine.allocator.capacity


# Adapters on disk


@pytest.mark.parametrize("call", [0, 1, 5])
def test_ctrl_c_while_adapters_are_read_from_disk(six, monkeypatch, call) -> None:
    six.load(six.names)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, six.engine.store, "request", call, partial(signal.raise_signal, signal.SIGINT))
        six.engine.generate([six.prompt] * 6, six.params, list(six.names))
    assert_nothing_left(six.engine)
    six.assert_right(six.serve([*six.names, None]), six.expected)


@pytest.mark.parametrize("held", [True, False])
def test_ctrl_c_while_an_adapter_is_spilled_for_another(six, monkeypatch, held) -> None:
    """held: takes effect after the load. A second Ctrl-C is not held back: the load fails and changes nothing."""
    six.load("ab")
    interrupt = partial(signal.raise_signal, signal.SIGINT) if held else partial(raise_, KeyboardInterrupt())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, SpillFiles, "write", 0, interrupt)
        six.load("c")
    loaded = "abc" if held else "ab"
    assert [info.name for info in six.engine.adapters()] == list(loaded)
    six.load("d")
    assert six.engine.store.stats().resident_bytes == six.nbytes
    six.assert_right(six.serve(loaded + "d"), loaded + "d")


def test_cancelling_the_last_request_of_an_unloaded_adapter_during_its_read(six, monkeypatch, caplog) -> None:
    """Its content is dropped at once; the read that is under way ends without a warning."""
    six.load(six.names)
    begun, blocked, read = threading.Event(), threading.Event(), SpillFiles.read
    monkeypatch.setattr(SpillFiles, "read", lambda *args: (begun.set(), blocked.wait(TIMEOUT), read(*args))[2])
    request = six.engine.add_request(six.prompt, six.params, "b")
    six.engine.step()
    assert begun.wait(TIMEOUT)
    assert not six.engine.unload_adapter("b"), "its request waits"
    six.engine.cancel(request)
    assert [delta.finish_reason for delta in six.engine.step()] == ["cancelled"]
    with pytest.raises(AdapterError, match="no adapter with digest"):
        six.engine.store.request(six.digest("b"))
    blocked.set()
    six.assert_right(six.serve("ac"), "ac")
    assert caplog.messages == []


def test_closed_engine_holds_nothing(tiny, tmp_path) -> None:
    with tiny.engine(spill_dir=tmp_path / "spill") as engine:
        engine.load_adapter("a", random_adapter(tiny.geometry, 4))
        engine.add_request(PROMPT, LONG, "a")
        for _ in range(3):
            engine.step()
    assert not engine.has_work() and engine.stats().pages.kv == 0
    assert not list(tmp_path.glob("spill/**/*.tiles"))


def test_request_whose_output_fails_ends_with_the_reason_and_others_continue(engine, monkeypatch) -> None:
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


def test_requests_of_a_lost_process_are_not_left_unfinished(engine, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.executor), "is_lost", True)
        before_call(patch, engine.executor, "dispatch", 0, partial(raise_, ProcessLostError("process 1 is lost")))
        with pytest.raises(ProcessLostError):
            engine.generate([PROMPT], LONG)
    assert_nothing_left(engine)
    assert engine.generate([PROMPT], LONG)[0].finish_reason == "length"
