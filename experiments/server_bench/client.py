"""Streams of a server from one event loop, with the time at which each token arrived."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop

from experiments.server_bench.server import LETTERS, MAX_MODEL_LEN, STEP_SECONDS

TEXT = re.compile(rb'"text":"([^"]*)"')
NUMBER_OF = np.zeros(256, np.int64)
NUMBER_OF[list(LETTERS.encode())] = range(len(LETTERS))
WARM_UP_SECONDS = 0.5
"""Time from the first token of the last stream to the measurement."""
START_SECONDS = 60.0


@dataclass
class Arrivals:
    """Tokens that arrived while measuring.

    Attributes:
      times: seconds on the monotonic clock, `[n]`.
      numbers: interval of each token modulo the number of letters, `[n]`.
      seconds: length of the measurement.
      cpu_seconds: CPU time of this process in it.
      before, after: values of the caller's function at both ends of it.
    """

    times: np.ndarray
    numbers: np.ndarray
    seconds: float
    cpu_seconds: float
    before: Any
    after: Any

    def latencies(self) -> np.ndarray:
        """Returns seconds from the engine's read of each token to its arrival. Those of more than a second are taken
        modulo `STEP_SECONDS` times the number of letters."""
        period = STEP_SECONDS * len(LETTERS)
        return np.mod(self.times - self.numbers * STEP_SECONDS, period)


class _Stream(asyncio.Protocol):
    """A connection that asks again whenever an answer is complete."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.received: list[tuple[float, bytes]] = []
        self.tail = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.monotonic(), data))
        self.tail = (self.tail + data)[-8:]
        if self.tail.endswith(b"\r\n0\r\n\r\n"):
            self.tail = b""
            self._transport.write(self._request)

    def close(self) -> None:
        self._transport.abort()


def measure(port: int, streams: int, prompt: list[int], seconds: float, read: Callable[[], Any]) -> Arrivals:
    """Keeps `streams` requests under way for a warm-up and then `seconds`.

    Args:
      prompt: the server paces its steps by it.
      read: called at both ends of the measurement.
    """
    return uvloop.run(_measure(port, streams, prompt, seconds, read))


async def _measure(port: int, streams: int, prompt: list[int], seconds: float, read: Callable[[], Any]) -> Arrivals:
    tokens = MAX_MODEL_LEN - 16
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    request = f"{head}\r\n\r\n{body}".encode()
    loop, opened = asyncio.get_running_loop(), []
    for _ in range(streams):
        _, one = await loop.create_connection(lambda: _Stream(request), "127.0.0.1", port)
        opened.append(one)
    async with asyncio.timeout(START_SECONDS):
        while not all(one.received for one in opened):
            await asyncio.sleep(0.05)
    await asyncio.sleep(WARM_UP_SECONDS)
    before, start, cpu = read(), time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    after, end, cpu = read(), time.monotonic(), time.process_time() - cpu
    for one in opened:
        one.close()
    times: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for one in opened:
        rest = b""
        for at, data in one.received:
            data = rest + data
            cut = data.rfind(b"\n\n") + 2  # an event may be in two parts
            events, rest = (data[:cut], data[cut:]) if cut > 1 else (b"", data)
            if start <= at < end:
                letters = np.frombuffer(b"".join(TEXT.findall(events)), np.uint8)
                times.append(np.full(letters.size, at))
                numbers.append(NUMBER_OF[letters])
    if not sum(part.size for part in times):
        raise RuntimeError(f"no token came: {opened[0].received[:1]}")
    return Arrivals(np.concatenate(times), np.concatenate(numbers), end - start, cpu, before, after)
