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
from typing import Any, Protocol

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
    server = _Server(config_of(app, settings), settings, served)
    server.run(sockets=[listener])
    return server.status


def config_of(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """Returns uvicorn's settings. Raises the process's limit on file handles if necessary."""
    connections = _connections(settings.limits)
    return uvicorn.Config(
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


class _Server(uvicorn.Server):
    """Drains at a signal, and reports when requests are accepted."""

    def __init__(self, config: uvicorn.Config, settings: ServerSettings, served: Served) -> None:
        super().__init__(config)
        self._settings, self._served = settings, served
        self.status = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        on_signals(self._settings, self._end)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say_listening(self._settings, self.servers[0].sockets[0])
        self._following = asyncio.create_task(self._follow())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # the system refuses new connections
        await self._served.drain()
        self._following.cancel()
        await super().shutdown(sockets)

    async def _follow(self) -> None:
        self.status = await self._served.follow(say)
        await asyncio.sleep(1.0)  # until clients have their errors
        self.should_exit = True

    def _end(self) -> None:
        self.should_exit = True


def on_signals(settings: ServerSettings, end: Callable[[], None]) -> None:
    """Makes the event loop call `end` at SIGTERM or Ctrl-C; a second signal ends the process at once."""
    signals: list[int] = []

    def handle(number: int) -> None:
        if signals:
            say("a second signal: ending at once")
            os._exit(128 + number)
        signals.append(number)
        say(f"stopping: requests under way have {settings.drain_seconds:g} s; a second signal ends at once")
        end()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)


def say(text: str) -> None:
    """Prints a message for the operator."""
    print(f"slora: {text}", file=sys.stderr, flush=True)


def say_listening(settings: ServerSettings, listener: Any) -> None:
    """Prints the address of a listening socket."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    say(f"listening on http://{host}:{port}; loading {settings.base_name}")
    if not settings.is_loopback and not settings.api_keys:
        say("any client that reaches this address may generate and manage adapters: set api_keys")


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Opens a listening socket. Raises ConfigError if the address cannot be listened on.

    Args:
      is_shared: whether other sockets of this user may have the same port; those that listen share the connections.
        The socket does not listen yet.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not is_shared:
            return socket.create_server(address[:2], family=family, backlog=2048)
        shared = socket.socket(family)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            shared.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        shared.bind(address[:2])
        return shared
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
