"""The padded baseline: batched matrix products over zero-padded adapters (S-LoRA's `--bmm`, after `torch.bmm`).

Weights of a step's adapters are gathered from the pool into zero-padded `[n, d_in, r]` and `[n, r, d_out]`, rows into
zero-padded `[n, rows, d_in]`; each stack takes two batched products. Padded are:

- ranks: every projection of every adapter to the engine's largest rank (`max_rank`, in whole blocks of 16).
- rows of a decode step: every segment (one adapter's rows) to the longest of the step, as in the paper.
- rows of a mixed step: segments are cut into pieces of `tile_rows`. The paper multiplies each prompt's segment alone,
  unpadded, in a step without decoding sequences; padding those to the length of a prompt would be unfair.
- n and the longest segment: to the next of a few compiled sizes, since shapes are static. The host picks the smallest
  that holds the step (`smallest`), so the device has no branch.

The paper's code copies the weights of all layers into one tensor before each step; here each layer gathers its own,
which takes less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora import xla
from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div

RATIO = 8
"""Ratio of consecutive sizes of a decode step's padding."""


@dataclass(frozen=True)
class Padding:
    """Static shape of a step's padded work: `segments` of `rows` rows. cut: longer segments are split; otherwise a step
    with a longer segment does not fit."""

    segments: int
    rows: int
    cut: bool

    def holds(self, lengths: Sequence[int]) -> bool:
        """Returns whether segments of these lengths fit."""
        if self.cut:
            return sum(ceil_div(length, self.rows) for length in lengths) <= self.segments
        return len(lengths) <= self.segments and max(lengths, default=0) <= self.rows


def paddings(tokens: int, adapters: int, *, decode: bool, tile_rows: int) -> tuple[Padding, ...]:
    """Returns the shapes for steps of up to `tokens` rows and `adapters` adapters, fewest padded rows first; the last
    holds every step. Every shape holds `tokens` rows, because smaller steps are padded to their program anyway."""
    adapters = min(adapters, tokens)
    if not decode:
        most, full = ceil_div(tokens, tile_rows) + adapters, ceil_div(tokens, tile_rows)
        return tuple(Padding(n, tile_rows, cut=True) for n in _sizes(full, most, RATIO // 2))
    shapes = [
        Padding(n, rows, cut=False)
        for n in _sizes(1, adapters, RATIO)
        for rows in _sizes(1, tokens, RATIO)
        if n * rows >= tokens
    ]
    return tuple(sorted(shapes, key=lambda p: (p.segments * p.rows, p.segments)))


def smallest(shapes: Sequence[Padding], lengths: Sequence[int]) -> Padding:
    """Returns the first of `shapes` that holds segments of these lengths."""
    return next(padding for padding in shapes if padding.holds(lengths))


def _sizes(first: int, last: int, ratio: int) -> list[int]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return [*sizes, last]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedStack:
    """Addresses of one stack's weights in the pool as rows `[num_pages * 2 * page_size, W]`, for n padded segments and
    P projections of R ranks each.

    Attributes:
      a_row: int32 `[n, P, R, A chunks]`.
      b_row: int32 `[n, R, B chunks]` of each projection.
      live: bool `[n, P, R]`.
    """

    a_row: jax.Array
    b_row: tuple[jax.Array, ...]
    live: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedWork:
    """A step's padding, shared by all layers.

    Attributes:
      row: int32 `[n * rows]`, the step's row at each padded place (T: none).
      place: int32 `[T]`, the padded place of each row (n * rows: no adapter).
      stacks: addresses of every stack's weights.
    """

    row: jax.Array
    place: jax.Array
    stacks: tuple[PaddedStack, ...]


def prepare(
    layout: LoraLayout,
    pages: jax.Array,
    ranks: jax.Array,
    row_slot: jax.Array,
    lora_rows: jax.Array,
    max_rank: int,
    padding: Padding,
) -> PaddedWork:
    """Pads the rows `0 .. lora_rows`. Rows of one slot of `row_slot [T]` must be contiguous. `pages`, `ranks`: see
    `AdapterTable`."""
    tokens, places = row_slot.shape[0], padding.segments * padding.rows
    row = jnp.arange(tokens)
    live = row < lora_rows
    first = lax.cummax(jnp.where((row == 0) | (row_slot != jnp.roll(row_slot, 1)), row, 0))  # of its segment
    within = (row - first) % padding.rows
    begins = live & (within == 0)
    piece = jnp.cumsum(begins) - 1
    place = jnp.where(live, piece * padding.rows + within, places)
    slot = jnp.zeros(padding.segments, jnp.int32)
    slot = slot.at[jnp.where(begins, piece, padding.segments)].set(row_slot, mode="drop")
    rows = xla.prepare(layout, pages, ranks, slot, begins.sum(), max_rank)
    return PaddedWork(
        row=jnp.full(places, tokens, jnp.int32).at[place].set(row, mode="drop"),
        place=place,
        stacks=tuple(_padded(layout, stack, r) for stack, r in zip(layout.stacks, rows, strict=True)),
    )


def _padded(layout: LoraLayout, stack: Stack, rows: xla.StackRows) -> PaddedStack:
    """Converts groups of ranks to a contiguous axis of ranks."""
    first, a_chunks = 0, rows.a_row.shape[-1]
    a_row = jnp.moveaxis(rows.a_row, 0, 2)  # [n, P, G, GROUP, A chunks]
    n, projections = a_row.shape[:2]
    b_row, live = [], []
    for d_out in stack.d_outs:
        chunks = ceil_div(d_out, layout.width)
        own = jnp.moveaxis(rows.b_row[:, :, first : first + chunks], (0, 3), (1, 2))  # [n, G, GROUP, chunks]
        b_row.append(own.reshape(n, -1, chunks))
        live.append(jnp.moveaxis(rows.b_live[:, :, first], 0, 1).reshape(n, -1))
        first += chunks
    return PaddedStack(a_row.reshape(n, projections, -1, a_chunks), tuple(b_row), jnp.stack(live, 1))


def add(
    x: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack, layout: LoraLayout, work: PaddedWork, at: PaddedStack
) -> jax.Array:
    """Adds the LoRA part to `y [T, d_out]`: the arguments of `LoraProduct.__call__`, and the step's padded work."""
    n, projections, ranks = at.live.shape
    width, dtype = layout.width, pool.dtype
    flat = pool.reshape(-1, width)
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    columns = ceil_div(stack.d_in, width) * width
    padded = x.at[work.row].get(mode="fill", fill_value=0).reshape(n, -1, stack.d_in)
    padded = jnp.pad(padded, ((0, 0), (0, 0), (0, columns - stack.d_in)))  # [n, rows, columns]
    a = jnp.where(at.live[..., None, None], flat.at[at.a_row].get(mode="clip"), 0)  # [n, P, R, chunks, W]
    a = a.reshape(n, projections * ranks, columns)
    h = jnp.einsum("nlk,njk->nlj", padded, a, precision=exact, preferred_element_type=jnp.float32)
    deltas = []
    for p, d_out in enumerate(stack.d_outs):
        b = jnp.where(at.live[:, p, :, None, None], flat.at[at.b_row[p]].get(mode="clip"), 0)
        b = b.reshape(n, ranks, -1)[..., :d_out]  # [n, R, d_out]
        own = h[..., p * ranks : (p + 1) * ranks]
        halves = [own] if dtype == jnp.float32 else _halves(own, dtype)
        products = (
            jnp.einsum("nlj,njc->nlc", half, b, precision=exact, preferred_element_type=jnp.float32) for half in halves
        )
        deltas.append(sum(products))
    delta = jnp.concatenate(deltas, -1).reshape(-1, stack.d_out)
    sums = y.astype(jnp.float32) + delta.at[work.place].get(mode="fill", fill_value=0)
    return jnp.where((work.place < delta.shape[0])[:, None], sums.astype(y.dtype), y)


def _halves(h: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Splits float32 into two numbers of a 16-bit type with the same sum, for tensor cores."""
    high = h.astype(dtype)
    return [high, (h - high.astype(jnp.float32)).astype(dtype)]
