"""Copies of a tile's pages and rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
"""The kernels call `commit_smem` where the four warps of a program must synchronise: before a copy or product uses a
buffer that they have read or written."""

BY_ROW = plgpu.Layout.WGMMA_TRANSPOSED
"""Register layout in which a thread holds neighbours along a product's first axis, adjacent in memory."""


def wait_for(copies: Iterable[tuple[jax.Array, Any]]) -> None:
    """Waits for copies. Each is (whether it was started, its barrier)."""
    for started, barrier in copies:

        @pl.when(started)
        def _(barrier: Any = barrier) -> None:
            plgpu.barrier_wait(barrier)


def row_pieces(rows: jax.Array, most: int) -> list[tuple[int, jax.Array, jax.Array]]:
    """Splits `rows` (at most `most`) into powers of two: (size, first row, whether it is present) each. A copy has a
    static size, and must not write rows of another tile."""
    sizes = [1 << bit for bit in reversed(range(most.bit_length()))]
    return [(size, rows // (2 * size) * (2 * size), rows & size != 0) for size in sizes]


def page_of(pages: Any, slot: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page id and half of an adapter's tile number `tile`."""
    return pages[slot, tile // 2], lax.rem(tile, 2)
