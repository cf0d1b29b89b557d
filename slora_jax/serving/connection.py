"""HTTP connections with bounds: on a request's head, on pipelining, and on the time a client takes to read."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from slora_jax.serving.errors import ApiError
from slora_jax.serving.settings import Limits

MAX_PIPELINED = 16
"""Requests that a connection may send before their predecessor is answered."""


class GuardedProtocol(HttpToolsProtocol):
    """A connection that has so long to send a request's head, so much room for it, and so long to read its answers."""

    limits: Limits
    most: int  # connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._write_deadline: asyncio.TimerHandle | None = None
        self._head_deadline: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._cycles: list[RequestResponseCycle] = []  # whose answers are not complete
        if len(self.connections) > self.most:
            self._abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()  # whatever comes now, what is left of a refused body too
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(ApiError(431, "the request's head is too large (limits.header_bytes)", code="large_head"))

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
        self._cycles = [*(one for one in self._cycles if not one.response_complete), self.cycle]
        if len(self._cycles) > MAX_PIPELINED:
            self._abort()
        elif self.pipeline:
            self.flow.resume_reading()  # else nobody would notice when the client goes away

    def send_400_response(self, msg: str) -> None:
        if len(getattr(self, "url", b"")) > self.limits.header_bytes:  # the parser takes no longer one
            self._refuse(ApiError(431, "the request's head is too large (limits.header_bytes)", code="large_head"))
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
        self._tell_cycles()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._tell_cycles()  # a client that has closed its half is taken for gone

    def _await_head(self) -> None:
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self.limits.header_seconds, self._abort)

    def _abort(self) -> None:
        self._tell_cycles()
        self.transport.abort()

    def _tell_cycles(self) -> None:
        """The client reads no more answers, to the last request or those before it."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _refuse(self, error: ApiError) -> None:
        """Answers what the application does not get to see, once."""
        if self.transport.is_closing():
            return
        if any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            self._abort()  # in the midst of another answer
            return
        self._tell_cycles()
        body = error.response().body
        status = f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}\r\n"
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write((status + fields).encode() + body)
        self.transport.close()

    @staticmethod
    def _forget(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
