"""A slow disk, to measure what waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from slora_jax.adapters import AdapterTiles
from slora_jax.adapters.spill import SpilledTiles, SpillFiles


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Slows every read of a spilled adapter by `seconds` inside the block."""
    read = SpillFiles.read

    def read_slowly(files: SpillFiles, spilled: SpilledTiles) -> AdapterTiles:
        time.sleep(seconds)
        return read(files, spilled)

    with mock.patch.object(SpillFiles, "read", read_slowly):
        yield
