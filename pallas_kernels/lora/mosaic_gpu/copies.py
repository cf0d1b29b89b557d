"""Copies of a tile's pages and rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
"""`commit_smem` stands wherever the four warps of a program must wait for each other: before a buffer that they have
read or written goes to a copy or a product."""

BY_ROW = plgpu.Layout.WGMMA_TRANSPOSED
"""A thread holds neighbours of a product's first axis, which lie side by side in memory."""


def wait_for(copies: Iterable[tuple[jax.Array, Any]]) -> None:
    """Waits for the copies that were started: (whether it was, its barrier) each."""
    for started, barrier in copies:

        @pl.when(started)
        def _(barrier: Any = barrier) -> None:
            plgpu.barrier_wait(barrier)


def row_pieces(rows: jax.Array, most: int) -> list[tuple[int, jax.Array, jax.Array]]:
    """`rows` (at most `most`) as a sum of powers of two: for each its size, its first row, and whether it is there.
    A copy has a static size, and no row of another tile may be written."""
    sizes = [1 << bit for bit in reversed(range(most.bit_length()))]
    return [(size, rows // (2 * size) * (2 * size), rows & size != 0) for size in sizes]


def page_of(pages: Any, slot: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page id and half of an adapter's tile number `tile`."""
    return pages[slot, tile // 2], lax.rem(tile, 2)
