"""Lends one engine of the test's process to several loops and services in turn, also behind HTTP without a socket."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from slora_jax import Engine
from slora_jax.serving.http.app import create_app
from slora_jax.serving.service import Service
from slora_jax.serving.settings import ServerSettings


class Borrowed:
    """An engine whose `close` only ends its requests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        for request_id in list(self._engine.core.requests):
            self._engine.cancel(request_id)
        while self._engine.has_work():
            self._engine.step()


@asynccontextmanager
async def serving(engine: Engine, settings: ServerSettings) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """The service of an engine, ready, and a client of its endpoints."""
    app = create_app(settings, lambda: Borrowed(engine))  # type: ignore[arg-type,return-value]
    async with app.router.lifespan_context(app):
        service = app.state.service
        await until(lambda: service.is_ready)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            yield service, http
        assert service.loop.num_unfinished == 0


def in_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an asynchronous test. The limit only bounds a test that hangs."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **fixtures), 240))  # type: ignore[arg-type]

    return run


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
