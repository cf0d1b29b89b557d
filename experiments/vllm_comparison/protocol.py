"""The worker's half of the protocol: a line of JSON in, a line of JSON out. Standard library only, Python 3.11."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[str | None], int], list[list[int]]]
"""(prompts, adapter of each, number of new tokens) -> new tokens of each prompt."""


def run_worker(start: Callable[[dict[str, Any]], tuple[Generate, dict[str, str]]]) -> None:
    """Reads the settings from stdin's first line, starts the engine, replies with its versions, and then answers a line
    of requests at a time, with the new tokens and the time that they took, until stdin ends.

    Args:
      start: settings -> (the function that generates, versions of the packages by name).
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print: their lines belong to the log
    generate, versions = start(json.loads(sys.stdin.readline()))
    _reply(replies, {"python": sys.version.split()[0], **versions})
    for line in sys.stdin:
        message = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = generate(message["prompts"], message["adapters"], message["output"])
        seconds = time.perf_counter() - wall
        _reply(replies, {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tokens": tokens})


def _reply(replies: Any, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()
