"""`slora serve`: one engine in this process, or several replicas, behind one HTTP server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from fastapi import FastAPI

from slora_jax.distributed.group import EXIT_LOST
from slora_jax.engine import Engine
from slora_jax.errors import ProcessLostError, SloraError
from slora_jax.phases import report, seconds_since_start
from slora_jax.serving.health import Health
from slora_jax.serving.http.app import create_app
from slora_jax.serving.http.server import listen, serve_app
from slora_jax.serving.interpreter import freeze_objects, prepare_interpreter
from slora_jax.serving.replicas.deployment import serve_replicas
from slora_jax.serving.settings import ServerSettings


def serve(settings: ServerSettings, build: Callable[[], Engine]) -> int:
    """Serves until SIGTERM or Ctrl-C. Then new requests are rejected, those under way have `settings.drain_seconds`,
    and the exit status is 0. A second signal ends the process at once, with status 128 plus its number.

    Returns:
      The exit status: 1 if the engine died, 2 if its settings cannot be met, 3 if another process of the group that
      serves together is lost.

    Raises:
      ConfigError: the address cannot be listened on.
    """
    if settings.http_processes:  # nothing else needs pyzmq and msgspec
        from slora_jax.serving.http_processes.parent import serve_with_processes

        prepare_interpreter()
        return serve_with_processes(settings, build, _Engine)
    listener = listen(settings.host, settings.port)  # first, so that an address in use is reported at once
    if settings.replicas > 1:
        return serve_replicas(settings, listener)
    prepare_interpreter()
    app = create_app(settings, build)
    status = serve_app(app, settings, _Engine(app), listener)
    if app.state.service.loop.is_alive:  # such as in a compilation, which cannot be interrupted
        os._exit(status)
    return status


class _Engine:
    """Drains and follows the engine of this process (`Served`)."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def drain(self) -> None:
        await self._app.state.service.drain()

    async def follow(self, say: Callable[[str], None]) -> int:
        service = self._app.state.service
        while service.loop.health is Health.STARTING:
            await asyncio.sleep(0.05)
        if service.loop.health is Health.READY:
            freeze_objects()
            stats = service.loop.engine.store.stats()
            say(f"ready: {service.settings.base_name}, {stats.registered} adapters")
            report("total", seconds_since_start())
        while service.loop.health is not Health.DEAD:
            await asyncio.sleep(0.2)
        error = service.loop.error
        say(f"the engine is dead: {error if isinstance(error, SloraError) else repr(error)}")
        return EXIT_LOST if isinstance(error, ProcessLostError) else 2 if isinstance(error, SloraError) else 1
