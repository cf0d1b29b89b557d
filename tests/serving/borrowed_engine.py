"""Lends one engine of the test's process to several loops and services in turn."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from slora_jax import Engine


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
