"""The engine's process with HTTP in processes of its own: starts them, restarts them, and drains."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import uvloop

from slora_jax.engine import Engine
from slora_jax.serving.http.app import create_app
from slora_jax.serving.http.server import Served, listen, on_signals, say, say_listening
from slora_jax.serving.http_processes.hub import Hub
from slora_jax.serving.settings import ServerSettings

logger = logging.getLogger("slora_jax.serving")

STOP_SECONDS = 10.0
"""Time that HTTP processes have to end after a drain."""
SHORTEST_LIFE = 5.0
"""Seconds; a process that ends sooner is restarted that much after its start."""


class HttpProcesses:
    """Owns the HTTP processes. Runs in the event loop of the engine's process."""

    def __init__(self, settings: ServerSettings, port: int, hub: Hub, address: Path) -> None:
        self._settings, self._port, self._hub, self._address = settings, port, hub, address
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, tuple[bytes, multiprocessing.process.BaseProcess]] = {}
        self._starts = 0
        self._is_stopping = False

    def start(self, place: int) -> None:
        """Starts the process with a number below `http_processes`. It listens when it is ready, by a socket of its own:
        while it has none, other processes get all connections."""
        if self._is_stopping:
            return
        self._starts += 1
        name = f"http-{self._starts}".encode()
        self._hub.add(name)
        with listen(self._settings.host, self._port, is_shared=True) as listener:
            arguments = (self._settings, listener, self._address, name)
            process = self._context.Process(target=_run, args=arguments, name=name.decode(), daemon=True)
            process.start()
        self._running[place] = name, process
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended, place, time.monotonic())

    async def stop(self) -> None:
        """Returns when all have ended. Those that have just been started, or take too long, are killed."""
        self._is_stopping = True
        self._hub.stop()
        for name, process in self._running.values():
            if not self._hub.is_connected(name):
                process.kill()
        deadline = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for _, process in self._running.values():
            process.kill()

    def refuse_connections(self) -> None:
        """Makes all processes refuse new connections."""
        self._is_stopping = True
        self._hub.drain()

    def _ended(self, place: int, started: float) -> None:
        name, process = self._running.pop(place)
        events = asyncio.get_running_loop()
        events.remove_reader(process.sentinel)
        self._hub.remove(name)
        process.join()
        if not self._is_stopping:
            logger.error("an HTTP process has ended with status %s; another takes its place", process.exitcode)
            events.call_later(max(0.0, started + SHORTEST_LIFE - time.monotonic()), self.start, place)


def serve_with_processes(settings: ServerSettings, build: Callable[[], Engine], served: Callable[..., Served]) -> int:
    """Serves with `settings.http_processes` HTTP processes, as `serve` does; returns the exit status.

    Args:
      served: creates what drains and follows the engine of an application.
    """
    listen(settings.host, settings.port).close()  # an address in use is reported, though processes share a port
    with listen(settings.host, settings.port, is_shared=True) as reserved:  # keeps the port while a process restarts
        return uvloop.run(_serve(settings, build, served, reserved))


async def _serve(
    settings: ServerSettings,
    build: Callable[[], Engine],
    served: Callable[..., Served],
    reserved: socket.socket,
) -> int:
    app, stopping = create_app(settings, build), asyncio.Event()
    on_signals(settings, stopping.set)
    status = 0
    with tempfile.TemporaryDirectory(prefix="slora-") as directory:  # only this user can enter it
        async with app.router.lifespan_context(app):
            address = Path(directory) / "engine"
            hub = Hub(app.state.service, app, address)
            processes = HttpProcesses(_share(settings), reserved.getsockname()[1], hub, address)
            for place in range(settings.http_processes):
                processes.start(place)
            say_listening(settings, reserved)
            engine = served(app)
            following = asyncio.create_task(engine.follow(say))
            stop = asyncio.create_task(stopping.wait())
            await asyncio.wait((following, stop), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                status = following.result()
                await asyncio.sleep(1.0)  # until clients have their errors
            processes.refuse_connections()
            await engine.drain()
            await processes.stop()
            following.cancel()
            hub.close()
    if app.state.service.loop.is_alive:  # such as in a compilation, which cannot be interrupted
        os._exit(status)
    return status


def _share(settings: ServerSettings) -> ServerSettings:
    """Returns the settings of one HTTP process: the limits that it applies alone are divided."""
    limits, count = settings.limits, settings.http_processes
    parts = {name: -(-getattr(limits, name) // count) for name in ("connections", "bodies_bytes")}
    return replace(settings, limits=replace(limits, **parts))


def _run(settings: ServerSettings, listener: socket.socket, address: Path, name: bytes) -> None:
    from slora_jax.serving.http_processes.front import run

    run(settings, listener, address, name)
