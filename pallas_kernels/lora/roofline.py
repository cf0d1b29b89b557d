"""Least bytes and operations of a step's LoRA products, for one stack of one layer.

The live rows of the step's adapters count once; columns that pad a tile, page tables and work tables do not count. Rows
without an adapter of the stack cost nothing, since the result is added in place.
"""

from __future__ import annotations

import numpy as np

from pallas_kernels.lora.layout import LoraLayout, Stack
from pallas_kernels.roofline import Work

INTERMEDIATE_BYTES = 4
"""Bytes of one element of `x A`, the float32 result of shrink."""


def shrink_work(ranks: np.ndarray, rows: np.ndarray, stack: Stack, itemsize: int) -> Work:
    """Bytes: A once, x once, and `x A` written once. Operations: `2 * rows * rank * d_in`.

    Args:
      ranks: int `[n, 7]`, the adapters' ranks.
      rows: int `[n]`, each adapter's rows of the step.
      itemsize: bytes of an element of x and of the pool.
    """
    rank, rows = _live(ranks, rows, stack)
    total, hidden = rank.sum(1), rows[:, None] * rank  # [n], [n, projections]
    weights = int(total[rows > 0].sum()) * stack.d_in * itemsize
    inputs = int(rows[total > 0].sum()) * stack.d_in * itemsize
    elements = int(hidden.sum())
    return Work(weights + inputs + elements * INTERMEDIATE_BYTES, 2 * elements * stack.d_in)


def expand_work(ranks: np.ndarray, rows: np.ndarray, stack: Stack, itemsize: int) -> Work:
    """Bytes: B once, `x A` read once, and y read and written in the columns of the adapter's projections.
    Operations: `2 * rows * rank * d_out`. Arguments as in `shrink_work`; itemsize is also y's."""
    rank, rows = _live(ranks, rows, stack)
    widths, hidden = np.array(stack.d_outs), rows[:, None] * rank
    weights = int((rank[rows > 0] * widths).sum()) * itemsize
    outputs = 2 * int((rows[:, None] * (rank > 0) * widths).sum()) * itemsize
    return Work(weights + int(hidden.sum()) * INTERMEDIATE_BYTES + outputs, 2 * int((hidden * widths).sum()))


def layer_work(ranks: np.ndarray, rows: np.ndarray, layout: LoraLayout, itemsize: int) -> Work:
    """Shrink and expand of every stack of one layer."""
    return sum(
        (op(ranks, rows, stack, itemsize) for stack in layout.stacks for op in (shrink_work, expand_work)), Work()
    )


def backward_work(ranks: np.ndarray, rows: np.ndarray, stack: Stack, itemsize: int) -> dict[str, Work]:
    """The backward pass of a stack, by kernel; arguments as in `shrink_work`. Gradients of weights are float32 and are
    added to what their array holds.

    Returns:
      "gradient_b": dy, B and `x A` once, `g = dy B^T` written. "gradient_a": x and g once. "dx": A and g once, and dx
      read and written.
    """
    rank, rows = _live(ranks, rows, stack)
    widths, hidden, used = np.array(stack.d_outs), rows[:, None] * rank, rows > 0
    elements, into_x = int(hidden.sum()), 2 * int(hidden.sum()) * stack.d_in
    a, b = int(rank[used].sum()) * stack.d_in, int((rank[used] * widths).sum())
    x, dy = int(rows[rank.sum(1) > 0].sum()) * stack.d_in, int((rows[:, None] * (rank > 0) * widths).sum())
    of_b = itemsize * (dy + b + elements) + INTERMEDIATE_BYTES * (elements + 2 * b)
    return {
        "gradient_b": Work(of_b, 4 * int((hidden * widths).sum())),
        "gradient_a": Work(itemsize * (x + elements) + INTERMEDIATE_BYTES * 2 * a, into_x),
        "dx": Work(itemsize * (a + 2 * x) + INTERMEDIATE_BYTES * elements, into_x),
    }


def _live(ranks: np.ndarray, rows: np.ndarray, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the stack's projections `[n, projections]` and rows `[n]`, as integers that do not overflow."""
    return np.asarray(ranks, np.int64)[:, list(stack.rank_index)], np.asarray(rows, np.int64)
