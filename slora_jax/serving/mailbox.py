"""Passes new tokens from the engine's loop to an HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from slora_jax.engine import Delta, RequestOutput
from slora_jax.engine.outputs import TokenLogprobs


@dataclass
class Arrived:
    """New tokens of one sequence since the last `take`.

    Attributes:
      output: the whole output, with the last tokens.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    output: RequestOutput | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, delta: Delta) -> None:
        """Appends the result of a step."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.output = delta.output
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


class Mailbox:
    """New tokens of all sequences of one HTTP request, by index. A reader slower than the engine gets the tokens of
    several steps at once, so memory is bounded by what the sequences may generate.

    Attributes:
      direct: takes new tokens at once while the reader waits in `take`, and returns whether it did; otherwise the
        reader gets them. It must be quick, and must not raise.
    """

    def __init__(self) -> None:
        self.direct: Callable[[dict[int, Arrived]], bool] | None = None
        self._arrived: dict[int, Arrived] = {}
        self._error: Exception | None = None
        self._filled = asyncio.Event()
        self._is_awaited = False

    def put(self, index: int, delta: Delta) -> None:
        """Adds the result of a step for a sequence. `deliver` passes it on."""
        arrived = self._arrived.get(index)
        if arrived is None:
            arrived = self._arrived[index] = Arrived()
        arrived.add(delta)

    def deliver(self) -> None:
        """Passes the added tokens on, to `direct` or to the reader."""
        is_waiting = self._is_awaited and not self._filled.is_set()
        if self.direct is not None and is_waiting and self.direct(self._arrived):
            self._arrived = {}
        else:
            self._filled.set()

    def fail(self, error: Exception) -> None:
        """Makes the next `take` raise `error`. Only the first error counts."""
        self._error = self._error or error
        self._filled.set()

    async def take(self) -> dict[int, Arrived]:
        """Waits for new tokens and returns them. Raises the error given to `fail`."""
        self._is_awaited = True
        try:
            await self._filled.wait()
        finally:
            self._is_awaited = False
        self._filled.clear()
        if self._error is not None:
            self._filled.set()
            raise self._error
        arrived, self._arrived = self._arrived, {}
        return arrived
