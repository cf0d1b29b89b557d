"""Passes new tokens from the engine's loop to an HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from slora_jax.engine import Delta


class Mailbox:
    """New tokens of all sequences of one HTTP request, by index. A reader slower than the engine gets the tokens of
    several steps at once, so memory is bounded by what the sequences may generate.

    Attributes:
      direct: takes new tokens at once while the reader waits in `take`, and returns whether it did; otherwise the
        reader gets them. It must be quick, and must not raise.
    """

    def __init__(self) -> None:
        self.direct: Callable[[dict[int, Delta]], bool] | None = None
        self._arrived: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None  # the reader, until it is woken

    def put(self, index: int, delta: Delta) -> None:
        """Adds the result of a step for a sequence, which then belongs to the mailbox. `deliver` passes it on."""
        earlier = self._arrived.get(index)
        if earlier is None:
            self._arrived[index] = delta
        else:
            earlier.add(delta)

    def deliver(self) -> None:
        """Passes the added tokens on, to `direct` or to the reader."""
        if self._waiting is None:
            return  # the reader will find them
        if self.direct is not None and self.direct(self._arrived):
            self._arrived = {}
        else:
            self._wake()

    def fail(self, error: Exception) -> None:
        """Makes the next `take` raise `error`. Only the first error counts."""
        self._error = self._error or error
        self._wake()

    async def take(self) -> dict[int, Delta]:
        """Waits for new tokens and returns them. Raises the error given to `fail`."""
        if not self._arrived and self._error is None:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, {}
        return arrived

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
