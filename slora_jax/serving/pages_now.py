"""Every page of the pool, for whoever looks: one question to the engine, however many look."""

from __future__ import annotations

import asyncio
import time

from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.errors import unavailable
from slora_jax.serving.observation import page_kinds

FRESH_SECONDS = 0.5
"""For which an answer is good enough for others who ask."""
PATIENCE_SECONDS = 2.0


class PagesNow:
    """The newest `page_kinds` of an engine. The event loop's."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._asked = asyncio.Lock()
        self._time = float("-inf")
        self._kinds = b""

    async def kinds(self) -> bytes:
        """One byte a page. Raises ApiError 503 when the engine does not answer in time."""
        async with self._asked:
            if time.monotonic() - self._time > FRESH_SECONDS:
                try:
                    kinds = await asyncio.wait_for(self._loop.call(page_kinds), timeout=PATIENCE_SECONDS)
                except TimeoutError:
                    raise unavailable("the engine is in a long step", code="busy", retry_after=1) from None
                self._kinds, self._time = kinds.tobytes(), time.monotonic()
            return self._kinds
