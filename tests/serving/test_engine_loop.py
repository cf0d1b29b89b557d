"""The engine's thread: tokens are delivered, cancelled requests end within a step, faults are reported and survived."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from borrowed_engine import Borrowed, in_event_loop, until

from slora_jax import Engine, RequestOutput, SamplingParams
from slora_jax.errors import ConfigError, PoolError, RequestError
from slora_jax.scheduling.plan import NOT_FINITE
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.health import Health
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.mailbox import Mailbox

LONG = SamplingParams(max_tokens=80, ignore_eos=True)
STALL = 4.0
"""Seconds, longer than any step that does not hang."""


class Heard:
    """A listener that records its calls."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.health: list[Health] = []
        self.faults: list[BaseException] = []

    def finished(self, output: RequestOutput) -> None:
        self.outputs.append(output)

    def health_changed(self, health: Health) -> None:
        self.health.append(health)

    def fault(self, error: BaseException) -> None:
        self.faults.append(error)


@asynccontextmanager
async def looping(engine: Engine, heard: Heard | None = None, stall_seconds: float = 60) -> Any:
    loop = EngineLoop(lambda: Borrowed(engine), heard or Heard(), stall_seconds=stall_seconds)  # type: ignore[arg-type,return-value]
    loop.start()
    await until(lambda: loop.health is not Health.STARTING)
    try:
        yield loop
    finally:
        await loop.stop()
        await until(lambda: not loop.is_alive)  # a hang may have just ended: the engine must be free for the next test


async def finish(mailbox: Mailbox) -> tuple[list[int], RequestOutput]:
    tokens: list[int] = []
    while True:
        arrived = (await mailbox.take())[0]
        tokens += arrived.token_ids
        if arrived.output is not None:
            return tokens, arrived.output


async def failure(mailbox: Mailbox) -> ApiError:
    """Returns the error that ends a sequence."""
    with pytest.raises(ApiError) as raised:
        while True:
            await mailbox.take()
    return raised.value


def submit(loop: EngineLoop, prompt: list[int], params: SamplingParams = LONG) -> tuple[str, Mailbox]:
    mailbox = Mailbox()
    return loop.submit(prompt, params, None, "", mailbox, 0), mailbox


class Trap:
    """Replaces a method: calls in `failing` (counted from 1) raise, and all calls wait for `gate`."""

    def __init__(self, method: Callable, failing: Callable[[int], bool]) -> None:
        self._method, self._failing = method, failing
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        self.gate.wait()
        if self._failing(self.calls):
            raise RuntimeError("the device is on fire")
        return self._method(*args)


@pytest.fixture
def trap(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trap]:
    def set_trap(name: str, failing: Callable[[int], bool] = lambda call: False) -> Trap:
        made = Trap(getattr(engine.executor, name), failing)
        monkeypatch.setattr(engine.executor, name, made)
        return made

    return set_trap


@in_event_loop
async def test_tokens_equal_those_of_generate(engine) -> None:
    prompts = [[5 + i, 7, 9 + 3 * i] for i in range(24)]
    params = [SamplingParams(max_tokens=4 + i, temperature=0.7 * (i % 2), seed=i) for i in range(24)]
    expected = engine.generate(prompts, params)
    heard = Heard()
    async with looping(engine, heard) as loop:
        boxes = [submit(loop, *one)[1] for one in zip(prompts, params, strict=True)]
        for box, output in zip(boxes, expected, strict=True):
            tokens, last = await finish(box)
            assert tokens == last.token_ids == output.token_ids and last.text == output.text
        assert loop.num_unfinished == 0
    assert len(heard.outputs) == 24 and heard.health == [Health.READY, Health.STOPPED] and not heard.faults


@in_event_loop
async def test_tokens_of_short_steps_are_delivered_together(engine, monkeypatch) -> None:
    interval, taken = 0.1, 0
    monkeypatch.setattr("slora_jax.serving.mailbox.DELIVERY_SECONDS", interval)
    async with looping(engine) as loop:
        start, mailbox, output = time.monotonic(), submit(loop, [3, 4])[1], None
        while output is None:
            output, taken = (await mailbox.take())[0].output, taken + 1
        assert taken <= (time.monotonic() - start) / interval + 2
        assert len(output.token_ids) == LONG.max_tokens


@in_event_loop
async def test_one_long_call_runs_between_two_steps(engine) -> None:
    async with looping(engine) as loop:
        _, mailbox = submit(loop, [1, 2, 3])
        calls = [loop.call(lambda engine: engine.stats().steps, is_long=True) for _ in range(4)]
        steps = await asyncio.gather(*calls)
        assert sorted(set(steps)) == steps
        assert len((await finish(mailbox))[0]) == LONG.max_tokens
        assert await loop.call(lambda engine: engine.has_work(), is_long=True) is False


@in_event_loop
async def test_refused_sequence_fails_alone(engine) -> None:
    async with looping(engine) as loop:
        _, good = submit(loop, [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
        _, bad = submit(loop, [1] * 500)
        with pytest.raises(RequestError, match="500 tokens"):
            await bad.take()
        assert len((await finish(good))[0]) == 3


@in_event_loop
async def test_cancelled_sequence_runs_no_further_step(engine, trap) -> None:
    dispatch = trap("dispatch")
    async with looping(engine) as loop:
        request_id, mailbox = submit(loop, [4, 5, 6])
        await mailbox.take()
        await mailbox.take()
        dispatch.gate.clear()
        calls = dispatch.calls
        await until(lambda: dispatch.calls > calls)  # a step is being dispatched
        loop.cancel([request_id])
        dispatch.gate.set()
        stats = await loop.call(lambda engine: engine.stats())
        assert stats.running == 0 and stats.pages.kv == 0
        assert dispatch.calls == calls + 1, "steps ran after the one during which it was cancelled"
        assert loop.num_unfinished == 0


@pytest.mark.parametrize("place", ["dispatch", "read"])
@in_event_loop
async def test_failed_step_fails_running_sequences_only(engine, trap, place) -> None:
    heard = Heard()
    async with looping(engine, heard) as loop:
        made = trap(place, lambda call: call == 6)
        running = [submit(loop, [3 + i, 4]) for i in range(16)]  # as many as can run at once
        await running[0][1].take()
        waiting = [submit(loop, [50 + i], SamplingParams(max_tokens=3, ignore_eos=True)) for i in range(3)]
        for _, mailbox in running:
            error = await failure(mailbox)
            assert error.status_code == 500 and "on fire" in error.detail
        assert made.calls >= 6
        for _, mailbox in waiting:
            assert len((await finish(mailbox))[0]) == 3
        await until(lambda: heard.health[-2:] == [Health.RECOVERING, Health.READY])
        assert heard.health[:3] == [Health.READY, Health.RECOVERING, Health.READY] and len(heard.faults) == 1
        assert len((await finish(submit(loop, [9])[1]))[0]) == 80
        await loop.call(lambda engine: engine.check())


@in_event_loop
async def test_sequence_without_finite_logits_fails_alone(engine, monkeypatch) -> None:
    read = engine.executor.read
    requests = []

    def spoilt(step: Any) -> Any:
        tokens = read(step)
        rows = [row for row, one in enumerate(step.sequences) if one.request.prompt == [3, 4] and one.samples]
        requests.extend(rows)
        if len(requests) > 4:
            for row in rows:
                tokens[row] = NOT_FINITE
        return tokens

    monkeypatch.setattr(engine.executor, "read", spoilt)
    heard = Heard()
    async with looping(engine, heard) as loop:
        boxes = [submit(loop, prompt)[1] for prompt in ([3, 4], [4, 5])]
        error = await failure(boxes[0])
        assert "the base model: the logits of output token 4 are not finite" in error.detail
        assert error.status_code == 500
        assert len((await finish(boxes[1]))[0]) == 80
        await loop.call(lambda engine: engine.check())
    assert heard.health == [Health.READY, Health.STOPPED] and not heard.faults


@in_event_loop
async def test_requests_are_rejected_during_recovery(engine, trap) -> None:
    async with looping(engine) as loop:
        dispatch = trap("dispatch", lambda call: call == 3 and not dispatch.gate.clear())
        submit(loop, [3, 4])
        await until(lambda: loop.health is Health.RECOVERING)  # until the gate lets the probe through
        with pytest.raises(ApiError, match="recovers") as raised:
            loop.check_ready()
        assert raised.value.status_code == 503 and "Retry-After" in raised.value.headers
        dispatch.gate.set()
        await until(lambda: loop.health is Health.READY)
        loop.check_ready()


@in_event_loop
async def test_engine_that_does_not_recover_is_dead(engine, trap) -> None:
    heard = Heard()
    async with looping(engine, heard) as loop:
        trap("dispatch", lambda call: call >= 3)
        boxes = [submit(loop, [3 + i])[1] for i in range(20)]
        for mailbox in boxes:
            error = await failure(mailbox)
            assert error.status_code in (500, 503) and "on fire" in error.detail
        await until(lambda: loop.health is Health.DEAD)
        with pytest.raises(ApiError, match="dead"):
            loop.check_ready()
        with pytest.raises(ApiError, match="dead"):
            await loop.call(lambda engine: None)
        await until(lambda: heard.health[-1] is Health.DEAD)
        assert heard.faults


@in_event_loop
async def test_hanging_step_is_detected_and_survived(engine, trap) -> None:
    heard = Heard()
    async with looping(engine, heard, stall_seconds=STALL) as loop:
        dispatch = trap("dispatch")
        _, mailbox = submit(loop, [3, 4])
        await mailbox.take()
        dispatch.gate.clear()
        calls = dispatch.calls
        await until(lambda: dispatch.calls > calls)
        asked = asyncio.create_task(loop.call(lambda engine: engine.stats()))
        assert "stall_seconds" in (await failure(mailbox)).detail
        with pytest.raises(ApiError, match="does not return"):
            await asked
        assert loop.health is Health.STALLED and loop.num_unfinished == 0
        with pytest.raises(ApiError, match="does not return"):
            loop.check_ready()
        dispatch.gate.set()
        await until(lambda: loop.health is Health.READY)
        assert len((await finish(submit(loop, [9])[1]))[0]) == 80
    assert heard.health == [Health.READY, Health.STALLED, Health.RECOVERING, Health.READY, Health.STOPPED]


@pytest.mark.parametrize("sequences", [1, 20], ids=["in the probe", "in the next step"])
@in_event_loop
async def test_hang_after_a_failed_step_is_detected_and_survived(engine, trap, sequences) -> None:
    heard = Heard()
    async with looping(engine, heard, stall_seconds=STALL) as loop:
        dispatch = trap("dispatch", lambda call: call == 3 and not dispatch.gate.clear())
        boxes = [submit(loop, [3 + i])[1] for i in range(sequences)]
        await until(lambda: dispatch.calls > 3)  # the call after the failed one hangs
        await until(lambda: loop.health is Health.STALLED)
        for mailbox in boxes:
            await failure(mailbox)
        dispatch.gate.set()
        await until(lambda: loop.health is Health.READY)
        assert len((await finish(submit(loop, [9])[1]))[0]) == 80
    hang = [Health.READY, Health.RECOVERING, Health.STALLED, Health.RECOVERING, Health.READY, Health.STOPPED]
    assert heard.health == hang


@in_event_loop
async def test_wrong_bookkeeping_of_an_idle_engine_is_a_fault(engine, monkeypatch) -> None:
    monkeypatch.setattr("slora_jax.serving.engine_loop.CHECK_SECONDS", 0)
    heard = Heard()
    async with looping(engine, heard) as loop:
        await finish(submit(loop, [3, 4], SamplingParams(max_tokens=3, ignore_eos=True))[1])
        await until(lambda: loop._checked[1] == engine.core.counters.steps)
        assert loop.health is Health.READY and not heard.faults
        leak = PoolError("page 7 has no owner")
        checks = iter([leak])

        def check() -> None:
            if (error := next(checks, None)) is not None:
                raise error

        monkeypatch.setattr(engine, "check", check)
        await finish(submit(loop, [3, 4], SamplingParams(max_tokens=3, ignore_eos=True))[1])
        await until(lambda: Health.RECOVERING in heard.health and loop.health is Health.READY)
        assert heard.faults == [leak]  # the second check succeeds
        checks = iter([leak] * 2)
        await finish(submit(loop, [3, 4], SamplingParams(max_tokens=3, ignore_eos=True))[1])
        await until(lambda: loop.health is Health.DEAD)  # it stays wrong


@in_event_loop
async def test_hanging_call_is_detected_and_survived(engine) -> None:
    async with looping(engine, stall_seconds=STALL) as loop:
        gate = threading.Event()
        with pytest.raises(ApiError, match="does not return"):
            await loop.call(lambda engine: gate.wait())
        assert loop.health is Health.STALLED
        gate.set()
        await until(lambda: loop.health is Health.READY)


@in_event_loop
async def test_stop_does_not_wait_for_a_hanging_close(engine) -> None:
    gate = threading.Event()
    lent = Borrowed(engine)
    close, lent.close = lent.close, lambda: gate.wait() and close()  # type: ignore[method-assign]
    loop = EngineLoop(lambda: lent, Heard(), stall_seconds=STALL)  # type: ignore[arg-type,return-value]
    loop.start()
    await until(lambda: loop.health is Health.READY)
    _, mailbox = submit(loop, [3, 4])
    await loop.stop()
    error = await failure(mailbox)
    assert error.status_code == 503 and loop.is_alive
    gate.set()
    await until(lambda: not loop.is_alive)


@pytest.mark.parametrize("health", [Health.DEAD, Health.STOPPED, Health.STALLED])
@in_event_loop
async def test_sequence_submitted_after_the_engines_end_fails_at_once(engine, trap, health) -> None:
    """Its request passed the readiness check earlier, and was tokenized since."""
    async with looping(engine, stall_seconds=STALL) as loop:
        loop.check_ready()
        if health is Health.STOPPED:
            await loop.stop()
        else:
            dispatch = trap("dispatch", lambda call: health is Health.DEAD)
            if health is Health.STALLED:
                dispatch.gate.clear()
            for i in range(60):  # three full batches, which fail one after another
                submit(loop, [3 + i])
        await until(lambda: loop.health is health and not loop.num_unfinished)
        _, mailbox = submit(loop, [3, 4])
        assert (await failure(mailbox)).status_code == 503 and loop.num_unfinished == 0
        if health is Health.STALLED:
            dispatch.gate.set()


@in_event_loop
async def test_stop_fails_waiting_sequences(engine) -> None:
    async with looping(engine) as loop:
        mailbox = submit(loop, [3, 4])[1]
        await mailbox.take()
    assert (await failure(mailbox)).status_code == 503


@pytest.mark.parametrize(("error", "lines"), [(ConfigError("num_pages=3: too few"), 0), (OSError("no disk"), 1)])
def test_only_an_unexpected_build_failure_logs_a_traceback(error, lines, caplog) -> None:
    def build() -> Engine:
        raise error

    async def scenario() -> None:
        loop = EngineLoop(build, Heard(), stall_seconds=60)
        loop.start()
        await until(lambda: loop.health is Health.DEAD)
        assert loop.error is error
        with pytest.raises(ApiError, match="too few|no disk"):
            loop.engine  # noqa: B018
        await loop.stop()

    asyncio.run(scenario())
    assert caplog.text.count("Traceback") == lines and "the engine is dead" in caplog.text
