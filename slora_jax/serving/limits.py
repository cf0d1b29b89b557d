"""Bounds on what clients may send and hold: an ASGI layer around the app, and a count by client inside it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slora_jax.serving.errors import ApiError, unavailable
from slora_jax.serving.settings import Limits

OnRequest = Callable[[str | None, str, int, float], None]
"""Told of a request that is done: the route's template if there is one, method, status, how many seconds it took."""


class Gate:
    """Reads at most so much of a request's body, for at most so long; and reports every request."""

    def __init__(self, app: ASGIApp, limits: Limits, on_request: OnRequest) -> None:
        self._app, self._limits, self._on_request = app, limits, on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            declared = dict(scope["headers"]).get(b"content-length", b"0")
            if declared.isdigit() and int(declared[:20]) > self._limits.body_bytes:
                await _too_large(self._limits).response()(scope, receive, sending)
            else:
                await self._app(scope, _Body(receive, self._limits).receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._on_request(route, scope["method"], status, time.perf_counter() - start)


class _Body:
    """A request's body as the app receives it."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size, self._is_whole = 0, False
        self._deadline = time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()  # a disconnect
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise _unread(
                408, f"the body did not come within {seconds:g} s (limits.body_seconds)", "slow_body"
            ) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._size > self._limits.body_bytes:
                raise _too_large(self._limits)
        return message


class Shares:
    """How many sequences each client has unfinished, and all of them together."""

    def __init__(self, limits: Limits, max_seqs: int) -> None:
        """max_seqs: those that can run at once."""
        self._limits = limits
        self._most = max_seqs + limits.waiting
        self._held: Counter[str] = Counter()
        self._total = 0

    @contextmanager
    def hold(self, client: str, sequences: int) -> Iterator[None]:
        """Counts a client's sequences inside the block.

        Raises:
          ApiError: 400 for more than one request may ever have, 429 for more than the client may, 503 for more than the
            service takes.
        """
        limits = self._limits
        if sequences > min(limits.sequences, limits.per_client, self._most):
            most = min(limits.sequences, limits.per_client, self._most)
            raise ApiError(
                400,
                f"prompts times n is {sequences}; one request may have {most}",
                code="too_many_sequences",
                param="n",
            )
        if self._held[client] + sequences > limits.per_client:
            raise ApiError(
                429,
                f"{self._held[client]} sequences of yours are unfinished; limits.per_client={limits.per_client}",
                kind="rate_limit_error",
                code="too_many_requests",
                retry_after=1,
            )
        if self._total + sequences > self._most:
            raise unavailable(
                f"the queue is full: {limits.waiting} may wait (limits.waiting)", code="queue_full", retry_after=2
            )
        self._held[client] += sequences
        self._total += sequences
        try:
            yield
        finally:
            self._total -= sequences
            self._held[client] -= sequences
            if not self._held[client]:
                del self._held[client]


def _too_large(limits: Limits) -> ApiError:
    return _unread(413, f"the body is larger than {limits.body_bytes} bytes (limits.body_bytes)", "body_too_large")


def _unread(status: int, message: str, code: str) -> ApiError:
    """Of a request whose body is not read to its end: nothing can follow it on this connection."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})
