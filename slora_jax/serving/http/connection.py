"""HTTP connections with limits on a request's head, on pipelining, and on the time a client takes to read."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from slora_jax.serving.http.errors import ApiError, too_large_head
from slora_jax.serving.settings import Limits

WRITER = "slora.writer"
"""Extension of the ASGI scope: a `DirectWriter` of the response."""
MAX_PIPELINED = 16
"""Requests that a connection may send before the first of them is answered."""


class DirectWriter:
    """Writes parts of a response's body to its connection, past the layers of ASGI, which cost more than the rest of a
    token's way."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def write(self, body: bytes) -> None:
        """Writes a part of the body, which is not the last one, if `is_open`."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    @property
    def is_open(self) -> bool:
        """Returns whether the response has begun, has not ended, and its connection takes more now."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (
            cycle.response_complete or cycle.disconnected or cycle.flow.write_paused
        )


class GuardedProtocol(HttpToolsProtocol):
    """A connection with limits on the time and size of a request's head, and on the time to read its answers.

    Attributes:
      most: connections that may be open.
    """

    limits: Limits
    most: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._write_deadline: asyncio.TimerHandle | None = None
        self._head_deadline: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._cycles: list[RequestResponseCycle] = []  # with incomplete answers
        if len(self.connections) > self.most:
            self._abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()  # for any data, the rest of a refused body too
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(too_large_head())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget(self._head_deadline)
        self._head_deadline = None
        upgrades = self.parser.should_upgrade()
        if upgrades and any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            message = "Upgrade: this service speaks HTTP/1.1 only, and cannot tell a body from another protocol"
            self._refuse(ApiError(400, message, code="bad_http"))  # the parser would take it for the next request
            return
        super().on_headers_complete()
        self.cycle.keep_alive &= not upgrades
        self.scope["extensions"] = {WRITER: DirectWriter(self.cycle)}  # type: ignore[dict-item]
        self._cycles = [*(one for one in self._cycles if not one.response_complete), self.cycle]
        if len(self._cycles) > MAX_PIPELINED:
            self._abort()
        elif self.pipeline:
            self.flow.resume_reading()  # otherwise a disconnect would go unnoticed

    def send_400_response(self, msg: str) -> None:
        if len(getattr(self, "url", b"")) > self.limits.header_bytes:  # the parser accepts none longer
            self._refuse(too_large_head())
        else:
            self._refuse(ApiError(400, "this is no HTTP/1.1 request", code="bad_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.limits.write_seconds, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget(self._write_deadline)
        self._write_deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget(self._head_deadline)
        self._forget(self._write_deadline)
        self._disconnect_cycles()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._disconnect_cycles()  # a half-closed connection counts as closed

    def _await_head(self) -> None:
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self.limits.header_seconds, self._abort)

    def _abort(self) -> None:
        self._disconnect_cycles()
        self.transport.abort()

    def _disconnect_cycles(self) -> None:
        """Marks all unfinished requests as disconnected, pipelined ones too."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _refuse(self, error: ApiError) -> None:
        """Answers, once, a request that does not reach the application."""
        if self.transport.is_closing():
            return
        if any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            self._abort()  # in the midst of another answer
            return
        self._disconnect_cycles()
        body = error.response().body
        status = f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}\r\n"
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write((status + fields).encode() + body)
        self.transport.close()

    @staticmethod
    def _forget(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
