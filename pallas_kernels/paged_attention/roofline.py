"""Least bytes and operations of a step's attention, in one layer, and its predicted cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pallas_kernels.paged_attention.plan import AttentionShape, triton_plan
from pallas_kernels.paged_attention.work import WorkShape, count_items
from pallas_kernels.prediction import Call, kernel_cost
from pallas_kernels.roofline import Work


def attention_work(
    rows: np.ndarray,
    context: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    window: int | None = None,
) -> Work:
    """Work of decode rows and prefill chunks.

    Bytes: the keys and values that any row of a sequence sees, once per sequence; q once; the output once. Only live
    rows of pages count; page tables and partial results of split contexts do not. Operations: `4 * head_dim` for each
    query head and each key that it sees (scores and weighted sum, without softmax).

    Args:
      rows, context: int `[S]`, each sequence's rows in the step, and its tokens before them.
      itemsize: bytes of an element of q, of the output and of the pool.
      window: most keys that a query sees.
    """
    rows, context = np.asarray(rows, np.int64), np.asarray(context, np.int64)
    end = context + rows
    window = int(end.max(initial=0)) if window is None else window
    keys = np.where(rows > 0, end - np.maximum(context + 1 - window, 0), 0)
    # Row i sees min(context + 1 + i, window) keys: a ramp that ends where the window is full.
    ramp = np.clip(window - context, 0, rows)
    seen = ramp * context + ramp * (ramp + 1) // 2 + (rows - ramp) * window
    elements = 2 * int(keys.sum()) * num_kv_heads + 2 * int(rows.sum()) * num_heads
    return Work(elements * head_dim * itemsize, 4 * head_dim * num_heads * int(seen.sum()))


def attention_call(rows: np.ndarray, context: np.ndarray, shape: AttentionShape) -> Call:
    """Returns the Triton kernel's call, planned for the current trace's device. rows, context: as in
    `attention_work`."""
    plan = triton_plan(shape)
    cost = kernel_cost("attention", "decode" if shape.decode else "prefill")
    facts = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    facts["itemsize"], window = shape.dtype.itemsize, shape.window
    works = tuple(attention_work(rows[kind], context[kind], **facts, window=window) for kind in (rows > 1, rows == 1))
    tiles = WorkShape.of(shape, plan)
    items = sum(count_items(rows, context, tiles))
    count = np.where(rows > 1, -(-rows // max(tiles.tile_rows, 1)), rows)  # of tiles, each over the keys up to its rows
    keys = 2 * int((count * context + (count + 1) * rows // 2).sum()) * shape.width * shape.dtype.itemsize
    return Call(works, replace(cost, warps=plan.warps, per_sm=plan.per_sm), items * shape.num_kv_heads, keys / 1024)
