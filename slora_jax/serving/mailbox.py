"""Passes new tokens from the engine's loop to an HTTP request."""

from __future__ import annotations

import asyncio
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
    several steps at once, so memory is bounded by what the sequences may generate."""

    def __init__(self) -> None:
        self._arrived: dict[int, Arrived] = {}
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        """Adds the result of a step for a sequence."""
        self._arrived.setdefault(index, Arrived()).add(delta)
        self._filled.set()

    def fail(self, error: Exception) -> None:
        """Makes the next `take` raise `error`. Only the first error counts."""
        self._error = self._error or error
        self._filled.set()

    async def take(self) -> dict[int, Arrived]:
        """Waits for new tokens and returns them. Raises the error given to `fail`."""
        await self._filled.wait()
        self._filled.clear()
        if self._error is not None:
            self._filled.set()
            raise self._error
        arrived, self._arrived = self._arrived, {}
        return arrived
