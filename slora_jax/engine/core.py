"""The step loop: plan, dispatch, read the previous step. Engine, server, simulator and tests all run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from slora_jax.engine.trace import NO_TRACE, NoTrace
from slora_jax.errors import ProcessLostError
from slora_jax.memory import Resident, Upload
from slora_jax.metrics import Counters, FinishReason
from slora_jax.scheduling import AdapterSource, Request, ScheduledSequence, Scheduler, StepPlan
from slora_jax.scheduling.plan import NOT_FINITE


class Step(Protocol):
    """A dispatched step."""

    @property
    def sequences(self) -> Sequence[ScheduledSequence]:
        """Sequences in batch order."""


class Landing(NamedTuple):
    """A finished upload; `error` is the reason if it failed."""

    upload: Upload
    error: str | None = None


class Executor[StepT: Step](AdapterSource, Protocol):
    """Executes plans and owns the uploads in flight. The scheduler queries it for adapters (`AdapterSource`)."""

    def lost(self) -> Mapping[str, str]:
        """Returns the digests of adapters found unreadable since the last call, with the reason."""

    def stage(self, upload: Upload) -> None:
        """Starts the copy of some pages of an adapter while steps run. If it raises, nothing is staged."""

    def landed(self) -> list[Landing]:
        """Returns the uploads that have finished since the last call, in the order of staging."""

    def upload(self, resident: Resident) -> None:
        """Uploads a whole adapter before the next step."""

    def dispatch(self, plan: StepPlan) -> StepT:
        """Starts a step without waiting for it."""

    def read(self, step: StepT) -> Sequence[int]:
        """Waits for a step. Returns the new token of each of `step.sequences`."""

    def wait(self, digest: str | None) -> None:
        """Waits until an upload finishes. If none is in flight, waits briefly for `digest`, the adapter of the request
        to admit next, to be read from disk."""


class Update[StepT: Step](NamedTuple):
    """The result of a step for one request.

    Attributes:
      token: its new token, or None.
      step, row: step and batch row that hold the token's log-probabilities and logits.
      scored: position of the prompt token that `row` scores; 0 if it scores none.
      ended: whether this ends the request.
      error: the reason if the request failed or the policy aborted it.
    """

    request: Request
    token: int | None = None
    step: StepT | None = None
    row: int = -1
    scored: int = 0
    ended: bool = False
    error: str | None = None


class EngineCore[StepT: Step]:
    """Runs a scheduler's plans on an executor. It handles requests and token ids; text and names are the `Engine`'s.

    A step is dispatched before the previous step's tokens are read. The end of a sequence is therefore detected one
    step late, and its surplus token is dropped.

    Attributes:
      clock: returns seconds; all times of requests are on this clock.
      requests: unfinished requests by id.
      trace: recorder of the steps; `NO_TRACE` by default.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor[StepT], clock: Callable[[], float], *, overlap: bool = True
    ) -> None:
        """With `overlap=False`, each step is read before the next one is planned."""
        self.scheduler, self.executor, self.clock = scheduler, executor, clock
        self.counters: Counters = scheduler.counters
        self.requests: dict[str, Request] = {}
        self.trace: NoTrace = NO_TRACE
        self._overlap = overlap
        self._in_flight: StepT | None = None
        self._updates: list[Update[StepT]] = []  # returned by the next step

    @property
    def in_flight(self) -> StepT | None:
        """The step that is dispatched but not read."""
        return self._in_flight

    @property
    def has_work(self) -> bool:
        """True if `step` has work to do or updates to report."""
        return self.scheduler.has_work() or self._in_flight is not None or bool(self._updates)

    def add(self, request: Request) -> None:
        """Queues a request. The caller has checked that it fits into the pool alone."""
        self.scheduler.add(request)
        self.requests[request.id] = request

    def step(self, may_wait: bool = True) -> list[Update[StepT]]:
        """Plans and dispatches one step, then reads the previous one and returns the updates. With `may_wait`, waits
        for an adapter if there is nothing to run or to report."""
        self._take_landed()
        plan = self._plan()
        previous = self.exchange(self._dispatch(plan) if plan.sequences else None)
        read = [] if previous is None else self.read(previous)
        updates = self.take_updates() + read
        if may_wait and previous is None and self._in_flight is None and not updates and self.scheduler.has_work():
            self.executor.wait(self.scheduler.next_digest(self.clock()))
        return updates

    def take_updates(self) -> list[Update[StepT]]:
        """Returns and clears the ends of requests that no step has reported yet."""
        updates, self._updates = self._updates, []
        return updates

    def exchange(self, dispatched: StepT | None) -> StepT | None:
        """Puts a dispatched step in flight. Returns the step to read now."""
        previous, self._in_flight = self._in_flight, dispatched
        if not self._overlap:
            previous, self._in_flight = self._in_flight, None
        return previous

    def read(self, step: StepT) -> list[Update[StepT]]:
        """Waits for a step, appends its tokens to their requests and ends the requests that are complete."""
        with self.trace.span("wait for device"):
            tokens = self.executor.read(step)
        self.trace.tokens_read(step)
        now, updates, read = self.clock(), [], 0
        for row, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=False)):
            request = sequence.request
            if request.finish_reason is not None:
                continue
            if not sequence.samples:
                if sequence.start < request.num_scored:
                    updates.append(Update(request, None, step, row, sequence.start + 1))
                elif request.pools_at(sequence.start):
                    updates.append(Update(request, None, step, row))
                continue
            if token == NOT_FINITE:
                updates.append(self._end_not_finite(request))
                continue
            grammar = request.grammar
            if grammar is not None and (error := grammar.accept(token)) is not None:
                self.finish(request, FinishReason.ERROR)
                updates.append(Update(request, ended=True, error=error))
                continue
            output = request.output
            if not output:
                request.metrics.first_token = now
            output.append(token)
            request.token_times.append(now)
            read += 1
            if ended := token in request.stop_token_ids or (grammar is not None and grammar.is_complete):
                self.finish(request, FinishReason.STOP, now)
            elif ended := len(output) >= request.max_new:
                self.finish(request, FinishReason.LENGTH, now)
            updates.append(Update(request, token, step, row, 0, ended))
        self.counters.tokens_generated += read
        return updates

    def finish(self, request: Request, reason: FinishReason, now: float | None = None) -> None:
        """Ends a request and frees its pages. No-op if it has ended. `now` is in seconds on the clock."""
        if request.finish_reason is None:
            self.scheduler.finish(request, reason, self.clock() if now is None else now)
            del self.requests[request.id]

    def fail(self, request: Request, error: str) -> None:
        """Ends an unfinished request with an error. The next `step` reports it."""
        self.finish(request, FinishReason.ERROR)
        self._updates.append(Update(request, ended=True, error=error))

    def fail_waiting(self, digest: str, error: str) -> None:
        """Ends all waiting requests for an adapter that cannot be uploaded."""
        for request in list(self.scheduler.waiting.by_adapter.get(digest, ())):
            assert request.adapter is not None
            self.fail(request, f"adapter {request.adapter.name!r}: {error}")

    def check(self) -> None:
        """Checks page ownership against the allocator. Raises `PoolError` on a leak."""
        self.scheduler.check()

    # The parts of a step

    def _take_landed(self) -> None:
        for upload, error in self.executor.landed():
            self.scheduler.residency.landed(upload)
            self.trace.landed(upload)
            if error is not None:
                self._fail_upload(upload, error)

    def _plan(self) -> StepPlan:
        """Plans a step, starts its adapter copies, and records requests that the policy aborts or whose adapter is
        unreadable."""
        with self.trace.span("schedule"):
            plan = self.scheduler.schedule(self.clock())
            self.trace.planned(plan, self.scheduler)
        for request, reason in plan.aborted:
            del self.requests[request.id]
            self._updates.append(Update(request, ended=True, error=reason))
        try:
            while plan.uploads:
                self._stage(plan.uploads[0])
                plan.uploads.pop(0)
        except BaseException as error:
            self._abandon(plan, error)
            raise
        for digest, reason in self.executor.lost().items():
            self.fail_waiting(digest, reason)
        return plan

    def _stage(self, upload: Upload) -> None:
        if not upload.resident.present:  # an earlier part of it just failed
            self.scheduler.residency.landed(upload)
            return
        try:
            self.executor.stage(upload)
        except ProcessLostError:
            raise
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            self.scheduler.residency.landed(upload)
            self._fail_upload(upload, repr(error))
        else:
            self.trace.staged(upload)

    def _fail_upload(self, upload: Upload, error: str) -> None:
        """Ends the requests waiting for an adapter whose copy failed, and frees its pages."""
        digest = upload.resident.digest
        self.fail_waiting(digest, f"content {digest[:12]} could not be copied to the device: {error}")
        self.scheduler.residency.drop(digest)

    def _dispatch(self, plan: StepPlan) -> StepT:
        try:
            for resident in plan.loads:
                with self.trace.upload(resident):
                    self.executor.upload(resident)
            with self.trace.span("dispatch"):
                step = self.executor.dispatch(plan)
        except BaseException as error:
            self._abandon(plan, error)
            raise
        self.trace.dispatched(step, plan)
        self.counters.steps += 1
        self.counters.tokens_computed += plan.num_tokens
        return step

    def _abandon(self, plan: StepPlan, error: BaseException) -> None:
        """Ends the requests of a failed plan and drops adapters that may not have reached the pool."""
        residency = self.scheduler.residency
        self.scheduler.abandon(plan, lambda request: self.fail(request, f"the step failed: {error!r}"))
        for resident in plan.loads:
            residency.drop(resident.digest)
        for upload in plan.uploads:
            residency.landed(upload)
            residency.drop(upload.resident.digest)

    def _end_not_finite(self, request: Request) -> Update[StepT]:
        """Ends a request whose logits are not finite, and drops the cached prefixes of its adapter."""
        self.finish(request, FinishReason.ERROR)
        if self.scheduler.prefixes is not None:
            self.scheduler.prefixes.drop(request.digest)
        model = "the base model" if request.adapter is None else f"adapter {request.adapter.name!r}"
        error = f"{model}: the logits of output token {len(request.output)} are not finite (NaN or infinity)"
        return Update(request, ended=True, error=error)
