"""Limits on requests: an ASGI layer around the app for their size and time, and a count of sequences by client."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slora_jax.serving.http.access import Access
from slora_jax.serving.http.errors import ApiError, too_large_head, unavailable
from slora_jax.serving.settings import Limits

OnRequest = Callable[[str | None, str, int, float], None]
"""Called after each request with the route's template if a route matched, method, status, and duration in seconds."""


class Gate:
    """Middleware that reads bodies of clients with a valid key only, bounds each body's size and time and the size of
    all bodies together, and reports every request."""

    def __init__(self, app: ASGIApp, limits: Limits, access: Access, on_request: OnRequest) -> None:
        self._app, self._limits, self._access, self._on_request = app, limits, access, on_request
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, size, is_whole = time.perf_counter(), 0, 0, False
        method, limits = scope["method"], self._limits
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves out the body

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def receiving() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # a disconnect
            if not size:
                self._check(scope)
            try:
                message = await asyncio.wait_for(receive(), start + limits.body_seconds - time.perf_counter())
            except TimeoutError:
                late = f"the body did not come within {limits.body_seconds:g} s (limits.body_seconds)"
                raise ApiError(408, late, code="slow_body", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                received = len(message.get("body", b""))
                size, self._bodies_bytes = size + received, self._bodies_bytes + received
                is_whole = not message.get("more_body", False)
            if size > limits.body_bytes:
                raise _too_large(limits)
            if self._bodies_bytes > limits.bodies_bytes:
                raise unavailable("too many large requests are under way", code="bodies_full", retry_after=1)
            return message

        try:
            if _head_bytes(scope) > limits.header_bytes:
                await too_large_head().response()(scope, receive, sending)
            else:
                await self._app(scope, receiving, sending)
        finally:
            self._bodies_bytes -= size
            route = getattr(scope.get("route"), "path", None)
            self._on_request(route, method, status, time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        """Checks the key and the declared length before any of the body is read. Raises ApiError."""
        self._access.check(Request(scope), None)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._limits.body_bytes:
            raise _too_large(self._limits)


class Shares:
    """Counts unfinished sequences, by client and in all."""

    def __init__(self, limits: Limits, max_num_seqs: int) -> None:
        """Starts at zero.

        Args:
          max_num_seqs: sequences that can run at once.
        """
        self._limits = limits
        self._most = max_num_seqs + limits.waiting
        self._held: Counter[str] = Counter()
        self._total = 0

    @contextmanager
    def hold(self, client: str, sequences: int) -> Iterator[None]:
        """Counts a client's sequences inside the block.

        Raises:
          ApiError: 400 above the limit of one request, 429 above the client's, 503 above the service's.
        """
        limits = self._limits
        most = min(limits.sequences, limits.per_client, self._most)
        if sequences > most:
            message = f"prompts times n is {sequences}; one request may have {most}"
            raise ApiError(400, message, code="too_many_sequences", param="n")
        if self._held[client] + sequences > limits.per_client:
            message = f"{self._held[client]} sequences of yours are unfinished; limits.per_client={limits.per_client}"
            raise ApiError(429, message, kind="rate_limit_error", code="too_many_requests", retry_after=1)
        if self._total + sequences > self._most:
            message = f"the queue is full: {limits.waiting} may wait (limits.waiting)"
            raise unavailable(message, code="queue_full", retry_after=2)
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
    message = f"the body is larger than {limits.body_bytes} bytes (limits.body_bytes)"
    return ApiError(413, message, code="body_too_large")
