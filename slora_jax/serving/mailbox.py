"""Passes new tokens from the engine's thread to HTTP requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from slora_jax.engine import Delta

DELIVERY_SECONDS = 0.004
"""Shortest interval between two deliveries of tokens. Shorter steps are joined: a write costs more than a token."""


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


class Deliveries:
    """Callbacks for an event loop from other threads, and the mailboxes that they fill. All that are pending are run in
    one turn of the event loop, and each mailbox is delivered once at its end.

    Args:
      events: the event loop.
    """

    def __init__(self, events: asyncio.AbstractEventLoop) -> None:
        self._events = events
        self._posted: deque[tuple[Callable, tuple[object, ...]]] = deque()
        self._is_scheduled = False
        self._filled: dict[Mailbox, None] = {}  # with tokens that are not passed on yet
        self._delivered_at = 0.0

    def post(self, callback: Callable, *arguments: object) -> None:
        """Lets the event loop call `callback`. May be called on any thread."""
        self._posted.append((callback, arguments))
        self._schedule()

    def put(self, mailbox: Mailbox, index: int, delta: Delta) -> None:
        """Adds the result of a step for a sequence to its mailbox, from within a callback."""
        mailbox.put(index, delta)
        self._filled[mailbox] = None

    def _schedule(self) -> None:
        if self._is_scheduled:
            return
        self._is_scheduled = True
        try:
            self._events.call_soon_threadsafe(self._run)
        except RuntimeError:
            pass  # the event loop has ended

    def _run(self) -> None:
        """Runs the callbacks that are posted by now, but not within `DELIVERY_SECONDS` of the last tokens."""
        now, next_delivery = self._events.time(), self._delivered_at + DELIVERY_SECONDS
        if now < next_delivery:
            self._events.call_at(next_delivery, self._run)
            return
        self._is_scheduled = False
        try:
            for _ in range(len(self._posted)):
                callback, arguments = self._posted.popleft()
                callback(*arguments)
        finally:
            filled, self._filled = self._filled, {}
            for mailbox in filled:
                mailbox.deliver()
            if filled:
                self._delivered_at = now
            if self._posted:
                self._schedule()  # what follows a callback that raised
