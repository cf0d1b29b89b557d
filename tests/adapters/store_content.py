"""Loads adapters into a store and compares its tiles."""

import time
from collections.abc import Callable

import numpy as np

from slora_jax.adapters import pack_tiles


def load(store, name, adapter):
    return store.publish(store.prepare(name, adapter))


def same(tiles, adapter, geometry):
    np.testing.assert_array_equal(tiles.pages, pack_tiles(adapter, geometry, "float32").pages)
    assert tiles.digest == adapter.digest
    return True


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> bool:
    """Returns whether the condition becomes true within `timeout` seconds: the store's thread may still be at work."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()
