"""Runs an ASGI application in uvicorn, from the first connection to the end of a drain."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from slora_jax.errors import ConfigError
from slora_jax.serving.http.connection import GuardedProtocol
from slora_jax.serving.settings import Limits, ServerSettings

KEEP_ALIVE_SECONDS = 30


class Served(Protocol):
    """The service behind the HTTP server. Both methods run in the event loop, after the application has started."""

    async def drain(self) -> None:
        """Rejects new requests; returns when those under way have ended, or failed at the deadline."""

    async def follow(self, say: Callable[[str], None]) -> int:
        """Reports when requests are accepted. Returns the exit status when no more will ever be."""


def serve_app(app: ASGIApp, settings: ServerSettings, served: Served, listener: socket.socket) -> int:
    """Serves `app` until a signal, or until `served.follow` returns; returns the exit status."""
    connections = _connections(settings.limits)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=type("Guarded", (GuardedProtocol,), {"limits": settings.limits, "most": connections}),
        ws="none",
        loop="uvloop",
        log_level="error",  # lower levels report clients' mistakes
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client's address is that of its connection, not one that it claims
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,  # after the drain, which has its own deadline
    )
    server = _Server(config, settings, served)
    server.run(sockets=[listener])
    return server.status


class _Server(uvicorn.Server):
    """Drains at a signal, and reports when requests are accepted."""

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
            self._say("any client that reaches this address may generate and manage adapters: set api_keys")
        self._following = asyncio.create_task(self._follow())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # the system refuses new connections
        await self._served.drain()
        self._following.cancel()
        await super().shutdown(sockets)

    async def _follow(self) -> None:
        self.status = await self._served.follow(self._say)
        await asyncio.sleep(1.0)  # until clients have their errors
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


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket. Raises ConfigError if the address cannot be listened on."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"host={host!r}, port={port}: cannot listen there: {error.strerror or error}") from error


def _connections(limits: Limits) -> int:
    """Returns how many connections may be open, and raises the limit on file handles if necessary."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 256  # for the model, adapters and libraries
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(limits.connections, soft - 256))
