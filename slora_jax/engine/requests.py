"""The engine's unfinished requests, from their arrival to their outputs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from slora_jax.adapters import AdapterStore
from slora_jax.engine.outputs import Delta
from slora_jax.engine.progress import Progress
from slora_jax.engine.runner import InFlight
from slora_jax.engine.sampling import NOT_FINITE
from slora_jax.scheduling import FinishReason, Request, Scheduler, StepPlan


class Requests:
    """Hands out tokens, and ends requests: with their last token, by `cancel`, or because they cannot be served.

    progress: of the unfinished, by id. unread: deltas for the next step to return (cancelled, lost adapter, or another
    stream's). generated: tokens handed out.
    """

    def __init__(self, scheduler: Scheduler, store: AdapterStore, release: Callable[[str], object]) -> None:
        """release: told the digest of an adapter that one request less uses."""
        self._scheduler, self._store, self._release = scheduler, store, release
        self.progress: dict[str, Progress] = {}
        self.unread: list[Delta] = []
        self.generated = 0

    def add(self, progress: Progress) -> None:
        """Queues a request."""
        request = progress.request
        if request.adapter is not None:
            self._store.acquire(request.adapter.digest)
        self.progress[request.id] = progress
        self._scheduler.add(request)

    def has(self, request_id: str) -> bool:
        """Whether a request is unfinished, or something of it is to be read."""
        return request_id in self.progress or any(delta.request_id == request_id for delta in self.unread)

    def take(self) -> list[Delta]:
        """What was to be read."""
        deltas, self.unread = self.unread, []
        return deltas

    def read(self, step: InFlight, tokens: np.ndarray, now: float) -> list[Delta]:
        """Appends a step's tokens to their requests. A token of a request that has ended is dropped. A request whose
        logits are not finite ends with an error."""
        deltas = []
        for row, (sequence, token) in enumerate(zip(step.sequences, tokens.tolist(), strict=False)):
            request = sequence.request
            progress = self.progress.get(request.id)
            if progress is None or progress.request is not request:
                continue
            if not sequence.samples:
                if sequence.start < request.num_scored:
                    progress.score(sequence.start + 1, step, row)
                continue
            if token == NOT_FINITE:
                deltas.append(self._end_not_finite(progress, now))
                continue
            self.generated += 1
            if request.metrics.first_token is None:
                request.metrics.first_token = now
            reason = progress.append(token, step, row, now)
            deltas.append(progress.delta([token]) if reason is None else self._end(progress, reason, [token], now))
        return deltas

    def cancel(self, request_id: str) -> bool:
        """Ends a request now. Returns whether there was such a request."""
        progress = self.progress.get(request_id)
        if progress is None:
            return False
        self.unread.append(self._end(progress, FinishReason.CANCELLED, [], time.perf_counter()))
        return True

    def end_failed(self, request: Request, error: str) -> None:
        """Ends a request whose step failed."""
        progress = self.progress[request.id]
        self.unread.append(self._end(progress, FinishReason.ERROR, [], time.perf_counter(), error))

    def end_aborted(self, plan: StepPlan) -> None:
        """Reports the requests that the policy gave up."""
        for request, reason in plan.aborted:
            now = request.metrics.finished or time.perf_counter()
            self.unread.append(self._end(self.progress[request.id], FinishReason.ABORT, [], now, reason))

    def end_waiting(self, digest: str, error: str) -> None:
        """Ends the waiting requests of an adapter that cannot be brought; others are not affected."""
        for request in list(self._scheduler.waiting.by_adapter.get(digest, ())):
            assert request.adapter is not None
            self.end_failed(request, f"adapter {request.adapter.name!r}: {error}")

    def _end_not_finite(self, progress: Progress, now: float) -> Delta:
        """Ends a request whose logits are not finite. What its adapter computed is not shared any more."""
        request = progress.request
        model = "the base model" if request.adapter is None else f"adapter {request.adapter.name!r}"
        error = f"{model}: the logits of output token {len(request.output)} are not finite (NaN or infinity)"
        delta = self._end(progress, FinishReason.ERROR, [], now, error)
        if self._scheduler.prefixes is not None:
            self._scheduler.prefixes.drop(request.digest)
        return delta

    def _end(
        self, progress: Progress, reason: FinishReason, tokens: list[int], now: float, error: str | None = None
    ) -> Delta:
        request = progress.request
        self._scheduler.finish(request, progress.end(reason), now)
        del self.progress[request.id]
        if request.adapter is not None:
            self._store.release(request.adapter.digest)
            self._release(request.adapter.digest)
        return progress.last_delta(tokens, error)
