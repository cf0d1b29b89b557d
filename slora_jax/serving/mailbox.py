"""Where a client's sequences meet what the engine brings for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from slora_jax.engine import Delta, RequestOutput
from slora_jax.engine.outputs import TokenLogprobs


@dataclass
class Arrived:
    """What has come for one sequence since it was last asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    output: RequestOutput | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.output = delta.output
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


class Mailbox:
    """All sequences of one HTTP request, by index. A reader that is slower than the engine finds several steps' tokens
    joined: what waits for it is bounded by what its sequences may generate."""

    def __init__(self) -> None:
        self._arrived: dict[int, Arrived] = {}
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        self._arrived.setdefault(index, Arrived()).add(delta)
        self._filled.set()

    def fail(self, error: Exception) -> None:
        """The next `take` raises `error`; the first one counts."""
        self._error = self._error or error
        self._filled.set()

    async def take(self) -> dict[int, Arrived]:
        """What has come, once there is something. Raises what `fail` was told."""
        await self._filled.wait()
        self._filled.clear()
        if self._error is not None:
            self._filled.set()
            raise self._error
        arrived, self._arrived = self._arrived, {}
        return arrived
