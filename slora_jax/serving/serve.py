"""`slora serve`: the application in uvicorn, from the first byte of a connection to the last of a drain."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from slora_jax.distributed.group import EXIT_LOST
from slora_jax.engine import Engine
from slora_jax.errors import ConfigError, ProcessLostError, SloraError
from slora_jax.phases import report, seconds_since_start
from slora_jax.serving.app import create_app
from slora_jax.serving.engine_loop import Health
from slora_jax.serving.errors import ApiError
from slora_jax.serving.settings import Limits, ServerSettings

logger = logging.getLogger("slora_jax.serving")

KEEP_ALIVE_SECONDS = 30
MAX_PIPELINED = 16
"""Requests that a connection may send before their predecessor is answered."""
SWITCH_SECONDS = 0.0005
"""For which one of the two threads keeps the interpreter when the other wants it: Python's own 5 ms would come between
a step's end and the next one's launch."""


def serve(settings: ServerSettings, build: Callable[[], Engine]) -> int:
    """Serves until SIGTERM or Ctrl-C: then no more is accepted, requests under way have `settings.drain_seconds`, and
    the exit status is 0. A second signal ends the process at once, with 128 plus its number.

    Returns 1 if the engine died, 2 if it could not be built as asked for, 3 if another process of those that serve
    together is lost.

    Raises:
      ConfigError: the address cannot be listened on.
    """
    listener = _listen(settings.host, settings.port)  # before anything takes time
    if settings.replicas > 1:
        from slora_jax.serving.replicas import serve_replicas

        return serve_replicas(settings, listener)
    sys.setswitchinterval(SWITCH_SECONDS)
    app = create_app(settings, build)
    status = serve_app(app, settings, _Engine(app), listener)
    if app.state.service.loop.is_alive:  # in a compilation, say, which would keep the process
        os._exit(status)
    return status


class Served(Protocol):
    """What the HTTP side is there for. Both are called in its event loop, when the application has started."""

    async def drain(self) -> None:
        """Takes no more requests; returns when those under way have ended, or failed at the deadline."""

    async def follow(self, say: Callable[[str], None]) -> int:
        """Says when requests are taken. Returns the process's exit status when they never will be any more."""


def serve_app(app: ASGIApp, settings: ServerSettings, served: Served, listener: socket.socket) -> int:
    """Serves `app` as `serve` does; returns the exit status."""
    connections = _connections(settings.limits)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=type("Guarded", (GuardedProtocol,), {"limits": settings.limits, "most": connections}),
        ws="none",
        loop="uvloop",
        log_level="error",  # below it, uvicorn tells of what clients did wrong
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client's address is the one that it comes from, not the one that it claims
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,  # after the drain, which has a deadline of its own
    )
    server = _Server(config, settings, served)
    server.run(sockets=[listener])
    return server.status


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
        """Nobody reads the answers any more: of the last request, and of those before it."""
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


class _Engine:
    """An engine of this process, `Served`."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def drain(self) -> None:
        await self._app.state.service.drain()

    async def follow(self, say: Callable[[str], None]) -> int:
        service = self._app.state.service
        while service.loop.health is Health.STARTING:
            await asyncio.sleep(0.05)
        if service.loop.health is Health.READY:
            stats = service.loop.engine.store.stats()
            say(f"ready: {service.settings.base_name}, {stats.registered} adapters")
            report("total", seconds_since_start())
        while service.loop.health is not Health.DEAD:
            await asyncio.sleep(0.2)
        error = service.loop.error
        say(f"the engine is dead: {error if isinstance(error, SloraError) else repr(error)}")
        return EXIT_LOST if isinstance(error, ProcessLostError) else 2 if isinstance(error, SloraError) else 1


class _Server(uvicorn.Server):
    """Ends by our rules, and says when it can be used."""

    def __init__(self, config: uvicorn.Config, settings: ServerSettings, served: Served) -> None:
        super().__init__(config)
        self._settings, self._served = settings, served
        self._has_signal = False
        self.status = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        self._say(f"listening on http://{host}:{port}; loading {self._settings.base_name}")
        if not self._settings.is_loopback and not self._settings.api_keys:
            self._say("anybody who reaches this address may generate and manage adapters: set api_keys")
        self._following = asyncio.create_task(self._follow())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # whoever comes now is refused by the system, and may try elsewhere
        await self._served.drain()
        self._following.cancel()
        await super().shutdown(sockets)

    async def _follow(self) -> None:
        self.status = await self._served.follow(self._say)
        await asyncio.sleep(1.0)  # for clients to be told
        self.should_exit = True

    def _end(self, number: int) -> None:
        if self._has_signal:
            self._say("a second signal: ending at once")
            os._exit(128 + number)
        self._has_signal = self.should_exit = True
        self._say(f"stopping: requests under way have {self._settings.drain_seconds:g} s; a second signal ends at once")

    @staticmethod
    def _say(text: str) -> None:
        print(f"slora: {text}", file=sys.stderr, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"host={host!r}, port={port}: cannot listen there: {error.strerror or error}") from error


def _connections(limits: Limits) -> int:
    """How many may be open: as many as the limits say, if the system gives so many file handles."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 256  # for the model, adapters and libraries
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(limits.connections, soft - 256))
