"""Runs the engine on its own thread: HTTP never waits for a step, and a step never waits for HTTP.

The event loop appends commands to a deque, and the thread runs them between steps. The results of a step go to the
event loop in one callback. The event loop reads all other facts about the engine from a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slora_jax.engine import Delta, Engine
from slora_jax.errors import ProcessLostError, SloraError
from slora_jax.scheduling import FinishReason, SamplingParams
from slora_jax.serving.health import UNAVAILABLE, Health, Listener, refusal
from slora_jax.serving.http.errors import ApiError, engine_failed, unavailable
from slora_jax.serving.mailbox import Deliveries, Mailbox
from slora_jax.serving.observability.snapshot import EngineSnapshot, observe

logger = logging.getLogger("slora_jax.serving")

SNAPSHOT_SECONDS = 0.1
"""Interval of snapshots."""
CHECK_SECONDS = 10.0
"""Shortest time between two checks of an idle engine's bookkeeping."""
MAX_FAULTS = 3
"""Failed steps in a row after which the engine is declared dead."""


class EngineLoop:
    """Owns an engine. The event loop creates, starts and uses it; other threads may read `snapshot`, `health` and
    `engine.store`."""

    def __init__(self, build: Callable[[], Engine], listener: Listener, *, stall_seconds: float) -> None:
        """Creates the loop; `start` starts it.

        Args:
          build: creates the engine, on the loop's thread.
          stall_seconds: longest call of the engine after that.
        """
        self._build, self._listener, self._stall_seconds = build, listener, stall_seconds
        self.health = Health.STARTING
        self.error: BaseException | None = None  # the last fault
        self.snapshot: EngineSnapshot | None = None
        self._engine: Engine | None = None
        self._events = asyncio.get_running_loop()
        self._calls: set[asyncio.Future] = set()  # waiting for the thread
        self._sequences: dict[str, tuple[Mailbox, int]] = {}  # unfinished ones by id
        self._deliveries = Deliveries(self._events)
        self._post = self._deliveries.post
        self._numbers = 0
        # Shared with the thread:
        self._commands: deque[Callable[[Engine], None]] = deque()
        self._long_commands: deque[Callable[[Engine], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._busy_since: float | None = None  # start of the current call of the engine
        self._faults_in_a_row = 0
        self._snapshot_at = 0.0
        self._checked = (0.0, 0)  # time of the last check, and the engine's steps by then
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # In the event loop

    def start(self) -> None:
        """Starts to build the engine. Returns at once."""
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch())

    @property
    def engine(self) -> Engine:
        """The engine, for its immutable parts and its store, which may be used from any thread.

        Raises:
          ApiError: 503, the engine is not built yet, or dead.
        """
        if self._engine is None or self.health in (Health.DEAD, Health.STOPPED):
            raise self._refusal()
        return self._engine

    @property
    def num_unfinished(self) -> int:
        """Number of sequences that wait or run."""
        return len(self._sequences)

    def check_ready(self) -> None:
        """Raises ApiError 503 unless requests are accepted now."""
        if self.health is not Health.READY:
            raise self._refusal()

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        adapter: str | None,
        tenant: str,
        mailbox: Mailbox,
        index: int,
        priority: int = 0,
    ) -> str:
        """Queues a sequence whose tokens go to `mailbox` under `index`, and returns its id. If the engine refuses it or
        has ended, the mailbox fails."""
        self._numbers += 1
        request_id = f"seq-{self._numbers}"
        if self.health in UNAVAILABLE:
            mailbox.fail(self._refusal())
            return request_id
        self._sequences[request_id] = mailbox, index

        def add(engine: Engine) -> None:
            try:
                engine.add_request(prompt, params, adapter, request_id, tenant, priority)
            except Exception as error:  # noqa: BLE001  reported to the client
                self._post(self._fail, [request_id], error)

        self._command(add, self._commands)
        return request_id

    def cancel(self, request_ids: list[str]) -> None:
        """Cancels sequences before the next step. Sequences that have ended already are ignored."""
        self._cancel([one for one in request_ids if self._sequences.pop(one, None) is not None])

    async def call[T](self, function: Callable[[Engine], T], *, is_long: bool = False) -> T:
        """Runs a function on the engine's thread between two steps, and returns its result or raises its error.

        Args:
          is_long: whether it takes more than microseconds. Between two steps, one such function runs.

        Raises:
          ApiError: 503, the engine is dead, or a call of it does not return; `function` may still run then.
        """
        future: asyncio.Future[T] = self._events.create_future()

        def run(engine: Engine) -> None:
            try:
                self._post(_settle, future, function(engine), None)
            except Exception as error:  # noqa: BLE001  raised by the caller's await
                self._post(_settle, future, None, error)

        if self.health in UNAVAILABLE:
            raise self._refusal()
        self._command(run, self._long_commands if is_long else self._commands)
        self._calls.add(future)
        try:
            return await future
        finally:
            self._calls.discard(future)

    def fail_all(self, error: Exception) -> None:
        """Fails every sequence with `error`."""
        unfinished = list(self._sequences)
        self._fail(unfinished, error)
        self._cancel(unfinished)

    async def stop(self) -> None:
        """Fails all sequences, ends the thread, and returns when the engine is closed. If the engine is still
        being built or a call is stalled, it returns while the thread still runs (`is_alive` is True)."""
        self._stopping = True
        self._wake.set()
        while self.is_alive and self.health is not Health.STARTING and not self._is_stuck():
            await asyncio.sleep(0.01)
        self._watchdog.cancel()

    @property
    def is_alive(self) -> bool:
        """Returns whether the thread runs."""
        return self._thread.is_alive()

    def _cancel(self, request_ids: list[str]) -> None:
        def cancel(engine: Engine) -> None:
            for request_id in request_ids:
                engine.cancel(request_id)

        if request_ids:
            self._command(cancel, self._commands)

    def _command(self, command: Callable[[Engine], None], queue: deque[Callable[[Engine], None]]) -> None:
        queue.append(command)
        self._wake.set()

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            output = delta.output
            mailbox, index = self._sequences.get(delta.request_id, (None, 0))
            if output is not None:
                self._listener.finished(output)
                self._sequences.pop(delta.request_id, None)
            if mailbox is None:  # cancelled
                continue
            if output is not None and output.finish_reason is FinishReason.ERROR:
                mailbox.fail(engine_failed(output.error or "the engine failed"))
            elif output is not None and output.finish_reason is FinishReason.ABORT:
                mailbox.fail(unavailable(output.error or "the policy aborted it", code="aborted", retry_after=1))
            else:
                self._deliveries.put(mailbox, index, delta)

    def _fail(self, request_ids: list[str], error: Exception) -> None:
        for request_id in request_ids:
            mailbox, _ = self._sequences.pop(request_id, (None, 0))
            if mailbox is not None:
                mailbox.fail(error)

    def _refusal(self) -> ApiError:
        return refusal(self.health, self.error)

    def _is_stuck(self) -> bool:
        """Returns whether the current call of the engine takes too long."""
        began = self._busy_since
        return began is not None and time.monotonic() - began >= self._stall_seconds

    async def _watch(self) -> None:
        """Fails all requests, and sets STALLED, when a call of the engine does not return."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_seconds / 4))
            if self.health not in (Health.READY, Health.RECOVERING) or not self._is_stuck():
                continue
            error = TimeoutError(f"a call of the engine takes longer than stall_seconds={self._stall_seconds:g}")
            logger.error("%s", error)
            self._become(Health.STALLED, error)
            self.fail_all(engine_failed(str(error)))
            self._refuse_calls()

    def _has_ended(self) -> None:
        self._fail(list(self._sequences), self._refusal())
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        for future in self._calls:
            _settle(future, None, self._refusal())

    # On the engine's thread

    def _run(self) -> None:
        engine = None
        try:
            engine = self._build()
            self._probe(engine)
            self._observe(engine)
            self._engine = engine
            self._become(Health.READY)
            while not self._stopping and self.health is not Health.DEAD:
                self._turn(engine)
        except BaseException as error:
            is_setting = engine is None and isinstance(error, SloraError)  # its message needs no traceback
            logger.error("the engine is dead", exc_info=None if is_setting else error)
            self._become(Health.DEAD, error)
        if self.health is not Health.DEAD:
            self._become(Health.STOPPED)
        self._post(self._has_ended)
        try:
            if engine is not None:
                with self._watched():
                    engine.close()
        except Exception as error:  # noqa: BLE001  the process ends anyway
            logger.error("closing the engine failed: %r", error)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Bounds calls of the engine inside the block by `stall_seconds`."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _turn(self, engine: Engine) -> None:
        """Runs the queued commands and one long one, then one step if there is work; otherwise waits for commands."""
        self._wake.clear()
        if self.health is Health.STALLED:
            self._become(Health.RECOVERING)  # the stalled call has returned
        with self._watched():
            while self._commands:
                self._commands.popleft()(engine)
        if self._long_commands:
            with self._watched():
                self._long_commands.popleft()(engine)
        if engine.has_work():
            with self._watched():
                self._step(engine)
            return
        if self.health is Health.RECOVERING:
            with self._watched():
                self._recover(engine)
        else:
            with self._watched():
                self._check(engine)
        self._observe(engine)
        if not self._long_commands:
            self._wake.wait(timeout=1.0)

    def _step(self, engine: Engine) -> None:
        try:
            deltas = engine.step()
        except ProcessLostError:
            raise
        except Exception as error:
            logger.error("a step failed", exc_info=error)
            self._fault(engine, error)
            return
        self._faults_in_a_row = 0
        if deltas:
            self._post(self._deliver, deltas)
        if time.monotonic() - self._snapshot_at >= SNAPSHOT_SECONDS:
            self._observe(engine)

    def _fault(self, engine: Engine, error: Exception) -> None:
        """Handles a failed step. The engine itself ends the requests of a step that was not dispatched; if a step's
        result cannot be read, all running requests fail."""
        self._become(Health.RECOVERING, error)
        self._faults_in_a_row += 1
        running = [request.id for request in engine.scheduler.running]
        self._post(self._fail, running, engine_failed(f"the engine failed: {error!r}"))
        for request_id in running:
            engine.cancel(request_id)
        if self._faults_in_a_row >= MAX_FAULTS:
            raise error

    def _check(self, engine: Engine) -> None:
        """Checks the idle engine's bookkeeping, if there were steps since the last check and that was a while ago."""
        now, steps = time.monotonic(), engine.core.counters.steps
        last, checked = self._checked
        if steps == checked or now - last < CHECK_SECONDS:
            return
        self._checked = now, steps
        try:
            engine.check()
        except Exception as error:
            logger.error("the engine's bookkeeping is wrong", exc_info=error)
            self._fault(engine, error)

    def _recover(self, engine: Engine) -> None:
        """Checks the idle engine's bookkeeping, and that it still generates."""
        engine.check()
        self._probe(engine)
        if self.health is Health.RECOVERING:  # if it is STALLED now, the next turn probes again
            logger.info("the engine has recovered")
            self._become(Health.READY)

    def _probe(self, engine: Engine) -> None:
        """Generates two tokens, to warm up the engine at the start or to test it after a fault."""
        [output] = engine.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
        if len(output.token_ids) != 2:
            raise RuntimeError(f"the engine does not answer: {output.finish_reason} {output.error or ''}")

    def _observe(self, engine: Engine) -> None:
        self.snapshot = observe(engine)
        self._snapshot_at = time.monotonic()

    # On either thread

    def _become(self, health: Health, error: BaseException | None = None) -> None:
        """Sets the health, with the fault that is the reason."""
        self.error = error or self.error
        self.health = health
        self._post(self._listener.health_changed, health)
        if error is not None:
            self._post(self._listener.fault, error)


def _settle[T](future: asyncio.Future[T], result: T, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
