"""A disk that takes its time, to see what waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from slora_jax.adapters import AdapterTiles
from slora_jax.adapters.spill import SpilledTiles, SpillFiles


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Inside the block, every read of a spilled adapter takes `seconds` longer."""
    read = SpillFiles.read

    def read_slowly(files: SpillFiles, spilled: SpilledTiles) -> AdapterTiles:
        time.sleep(seconds)
        return read(files, spilled)

    with mock.patch.object(SpillFiles, "read", read_slowly):
        yield
