"""Loads adapters into a store and compares its tiles."""

import numpy as np

from slora_jax.adapters import pack_tiles


def load(store, name, adapter):
    return store.publish(store.prepare(name, adapter))


def same(tiles, adapter, geometry):
    np.testing.assert_array_equal(tiles.pages, pack_tiles(adapter, geometry, "float32").pages)
    assert tiles.digest == adapter.digest
    return True
