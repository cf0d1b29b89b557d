"""Bounds on what clients may send and hold: an ASGI layer around the app, and a count by client inside it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slora_jax.serving.access import Access
from slora_jax.serving.errors import ApiError, unavailable
from slora_jax.serving.settings import Limits

OnRequest = Callable[[str | None, str, int, float], None]
"""Told of a request that is done: the route's template if there is one, method, status, how many seconds it took."""


class Gate:
    """Reads the bodies of clients that have a key, each at most so large and for at most so long, and of all of them
    together so much; and reports every request."""

    def __init__(self, app: ASGIApp, limits: Limits, access: Access, on_request: OnRequest) -> None:
        self._app, self._limits, self._access, self._on_request = app, limits, access, on_request
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, body = time.perf_counter(), 0, _Body(receive, self._limits.body_seconds)
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # the server that called sends no body

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def receiving() -> Message:
            if body.is_whole:
                return await receive()  # a disconnect
            if not body.size:
                self._check(scope)
            size = body.size
            message = await body.receive()
            self._bodies_bytes += body.size - size
            if body.size > self._limits.body_bytes:
                raise _too_large(self._limits)
            if self._bodies_bytes > self._limits.bodies_bytes:
                raise unavailable("too many large requests are under way", code="bodies_full", retry_after=1)
            return message

        try:
            if _head_bytes(scope) > self._limits.header_bytes:
                error = ApiError(431, "the request's head is too large (limits.header_bytes)", code="large_head")
                await error.response()(scope, receive, sending)
            else:
                await self._app(scope, receiving, sending)
        finally:
            self._bodies_bytes -= body.size
            route = getattr(scope.get("route"), "path", None)
            self._on_request(route, method, status, time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        """Before anything of a body is read. Raises ApiError."""
        self._access.check(Request(scope), None)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._limits.body_bytes:
            raise _too_large(self._limits)


class _Body:
    """A request's body on its way. size: bytes that have come."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive, self._seconds = receive, seconds
        self._deadline = time.monotonic() + seconds
        self.size, self.is_whole = 0, False

    async def receive(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {self._seconds:g} s (limits.body_seconds)",
                code="slow_body",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.is_whole = not message.get("more_body", False)
        return message


class Shares:
    """How many sequences each client has unfinished, and all of them together."""

    def __init__(self, limits: Limits, max_num_seqs: int) -> None:
        """max_num_seqs: those that can run at once."""
        self._limits = limits
        self._most = max_num_seqs + limits.waiting
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


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    return fields + len(scope["raw_path"]) + len(scope["query_string"])


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limits.body_bytes} bytes (limits.body_bytes)", code="body_too_large"
    )
