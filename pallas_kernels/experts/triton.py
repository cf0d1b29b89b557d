"""The products with experts in Triton: Ampere, Ada, Hopper. Three launches for a layer.

A *row* is a token with one of its experts, number `token * k + j`. The first kernel sorts the rows by expert and lists
tiles of at most `BLOCK_M` rows of one expert, exactly: experts without rows have none. An item of gate_up and of down
is a tile and a block of output columns. gate_up reads a row's token where it lies, and activates; down multiplies by
the row's routing weight and writes the row to its place in the token's order. A token's k results are then added in
that order, without atomics. A row's bits depend on its own numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.experts.plan import ExpertPlan, ProductPlan
from pallas_kernels.experts.xla import Add
from pallas_kernels.triton_call import triton_call
from pallas_kernels.weight_format import Kernels, ScaledKernels, codes_of

FIELDS = tl.constexpr(3)
"""Columns of the table of tiles: `expert, first_row, rows`; `first_row` is an index into the order."""

COUNTED = 1024
"""Rows that the first kernel reads at once."""


@triton.jit
def expert_tiles_kernel(
    chosen_ptr, order_ptr, tiles_ptr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Lists one expert's rows in ascending order, and its tiles. Tiles past the last have `rows` 0."""
    expert = tl.program_id(0)
    at, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, ROWS, BLOCK):
        ids = tl.load(chosen_ptr + start + at, mask=start + at < ROWS, other=EXPERTS)
        counts += tl.histogram(ids, BLOCK_E, mask=ids < EXPERTS)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(e < expert, counts, 0))
    count = tl.sum(tl.where(e == expert, counts, 0))
    first_tile = tl.sum(tl.where(e < expert, tiles, 0))
    if count > 0:
        place = first_row
        for start in range(0, ROWS, BLOCK):
            own = (tl.load(chosen_ptr + start + at, mask=start + at < ROWS, other=-1) == expert).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(own) - 1, start + at, mask=own > 0)
            place += tl.sum(own)
    tile = tiles_ptr + first_tile * FIELDS
    for begin in range(0, count, BLOCK_M):
        tl.store(tile, expert)
        tl.store(tile + 1, first_row + begin)
        tl.store(tile + 2, tl.minimum(count - begin, BLOCK_M))
        tile += FIELDS
    for dead in range(tl.sum(tiles) + expert, TILES, EXPERTS):
        tl.store(tiles_ptr + dead * FIELDS + 2, 0)


@triton.jit
def _item(tiles_ptr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's tile (expert, rows, first row in the order by expert) and first column."""
    i = tl.program_id(0)
    tile = tiles_ptr + i // BLOCKS * FIELDS
    expert, first, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    return expert, rows, first, i % BLOCKS * BLOCK_N


@triton.jit
def _rows(order_ptr, first, rows, BLOCK_M: tl.constexpr):
    """Numbers of a tile's rows `[BLOCK_M]`; those past its end repeat the last."""
    return tl.load(order_ptr + first + tl.minimum(tl.arange(0, BLOCK_M), rows - 1))


@triton.jit
def expert_gate_up_kernel(
    x_ptr, weight_ptr, scale_ptr, delta_ptr, tiles_ptr, order_ptr, out_ptr,
    PER_TOKEN: tl.constexpr, D_IN: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, SCALED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[rows of the tile, block of columns] = activation(x @ gate) * (x @ up), in the order by expert. SCALED: the
    weights are codes, which are converted before the product, and whose scales multiply the sums. ADDED: delta, gate |
    up in the order by expert, is added to the products."""
    expert, rows, first, n = _item(tiles_ptr, (WIDTH + BLOCK_N - 1) // BLOCK_N, BLOCK_N)
    if rows > 0:
        column, k = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        token = _rows(order_ptr, first, rows, BLOCK_M) // PER_TOKEN
        x_tile = x_ptr + token.to(tl.int64)[:, None] * D_IN + k[None, :]
        gate_tile = weight_ptr + expert.to(tl.int64) * (D_IN * 2 * WIDTH) + k[:, None] * (2 * WIDTH) + column[None, :]
        row = tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        delta = delta_ptr + first.to(tl.int64) * (2 * WIDTH) + (row[:, None] * (2 * WIDTH) + column[None, :])
        if ADDED and not SCALED:  # both loads after the sums would spill registers
            gate = tl.load(delta, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(delta + WIDTH, mask=mask, other=0.0).to(tl.float32)
        else:
            gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, D_IN, BLOCK_K, num_stages=STAGES):
            if D_IN % BLOCK_K == 0 and WIDTH % BLOCK_N == 0:
                x = tl.load(x_tile + start)
                w_gate = tl.load(gate_tile + start * (2 * WIDTH))
                w_up = tl.load(gate_tile + start * (2 * WIDTH) + WIDTH)
            else:
                inside = start + k < D_IN
                both = inside[:, None] & (column < WIDTH)[None, :]
                x = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
                w_gate = tl.load(gate_tile + start * (2 * WIDTH), mask=both, other=0.0)
                w_up = tl.load(gate_tile + start * (2 * WIDTH) + WIDTH, mask=both, other=0.0)
            gate = tl.dot(x, w_gate.to(x.dtype), gate, input_precision="ieee")
            up = tl.dot(x, w_up.to(x.dtype), up, input_precision="ieee")
        if SCALED:
            scale = scale_ptr + expert.to(tl.int64) * (2 * WIDTH) + column
            gate *= tl.load(scale, mask=column < WIDTH, other=0.0)[None, :]
            up *= tl.load(scale + WIDTH, mask=column < WIDTH, other=0.0)[None, :]
        if ADDED and SCALED:
            gate += tl.load(delta, mask=mask, other=0.0)
            up += tl.load(delta + WIDTH, mask=mask, other=0.0)
        if SILU:
            active = gate / (1 + tl.exp(-gate))
        else:  # gelu by tanh: tanh(t) = 1 - 2 / (exp(2 t) + 1)
            t = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            active = gate * (1 - 1 / (tl.exp(2 * t) + 1))
        out = out_ptr + (first + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out, (active * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_down_kernel(
    hidden_ptr, weight_ptr, scale_ptr, delta_ptr, tiles_ptr, order_ptr, routing_ptr, out_ptr,
    D_IN: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[rows of the tile, block of columns] = routing weight * (hidden @ down), in the tokens' order. ADDED: delta,
    in the order by expert, is added to the product."""
    expert, rows, first, n = _item(tiles_ptr, (WIDTH + BLOCK_N - 1) // BLOCK_N, BLOCK_N)
    if rows > 0:
        column, k, row = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
        place = _rows(order_ptr, first, rows, BLOCK_M)
        hidden_tile = hidden_ptr + (first + tl.minimum(row, rows - 1)).to(tl.int64)[:, None] * D_IN + k[None, :]
        weight_tile = weight_ptr + expert.to(tl.int64) * (D_IN * WIDTH) + k[:, None] * WIDTH + column[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, D_IN, BLOCK_K, num_stages=STAGES):
            if D_IN % BLOCK_K == 0 and WIDTH % BLOCK_N == 0:
                hidden = tl.load(hidden_tile + start)
                weight = tl.load(weight_tile + start * WIDTH)
            else:
                inside = start + k < D_IN
                hidden = tl.load(hidden_tile + start, mask=inside[None, :], other=0.0)
                mask = inside[:, None] & (column < WIDTH)[None, :]
                weight = tl.load(weight_tile + start * WIDTH, mask=mask, other=0.0)
            acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision="ieee")
        if SCALED:
            acc *= tl.load(scale_ptr + expert.to(tl.int64) * WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        if ADDED:
            delta = delta_ptr + first.to(tl.int64) * WIDTH + (row[:, None] * WIDTH + column[None, :])
            acc += tl.load(delta, mask=mask, other=0.0)
        acc *= tl.load(routing_ptr + place)[:, None]
        out = out_ptr + place.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def expert_outputs(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernels, down: Kernels,
    lora: Callable[[jax.Array], tuple[Add, Add]] | None = None, *,
    activation: str, plan: ExpertPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `api.expert_outputs`."""
    (num_tokens, per_token), (experts, width, d) = chosen.shape, codes_of(down).shape
    num_rows, used = chosen.size, min(experts, chosen.size)
    num_tiles = used + (num_rows - used) // plan.tile_rows
    order, tiles = triton_call(
        expert_tiles_kernel, chosen.astype(jnp.int32),
        out=[jax.ShapeDtypeStruct((num_rows,), jnp.int32), jax.ShapeDtypeStruct((num_tiles, 3), jnp.int32)],
        grid=(experts,), num_warps=4, num_stages=1, interpret=interpret,
        ROWS=num_rows, EXPERTS=experts, TILES=num_tiles, BLOCK_M=plan.tile_rows,
        BLOCK=min(COUNTED, triton.next_power_of_2(max(num_rows, 128))), BLOCK_E=triton.next_power_of_2(experts),
    )  # fmt: skip
    add_gate_up, add_down = (None, None) if lora is None else lora(order)
    delta = x
    if add_gate_up is not None:
        rows = x.at[order // per_token].get(mode="clip", wrap_negative_indices=False)
        delta = add_gate_up(rows, jnp.zeros((num_rows, 2 * width), x.dtype))
    (hidden,) = triton_call(
        expert_gate_up_kernel, x, *_codes_and_scales(gate_up), delta, tiles, order,
        out=[jax.ShapeDtypeStruct((num_rows, width), x.dtype)], interpret=interpret,
        **_launch(plan.gate_up, plan.tile_rows, num_tiles, d, width, gate_up, lora is not None),
        PER_TOKEN=per_token, SILU=activation == "silu",
    )  # fmt: skip
    delta = hidden if add_down is None else add_down(hidden, jnp.zeros((num_rows, d), x.dtype))
    (rows,) = triton_call(
        expert_down_kernel, hidden, *_codes_and_scales(down), delta, tiles, order, weights,
        out=[jax.ShapeDtypeStruct((num_rows, d), x.dtype)], interpret=interpret,
        **_launch(plan.down, plan.tile_rows, num_tiles, width, d, down, lora is not None),
    )  # fmt: skip
    rows = jnp.where((chosen < experts)[..., None], rows.reshape(num_tokens, per_token, d), 0).astype(jnp.float32)
    total = rows[:, 0]
    for j in range(1, per_token):
        total += rows[:, j]
    return total.astype(x.dtype)


def _codes_and_scales(kernels: Kernels) -> tuple[jax.Array, jax.Array]:
    """The arguments of a product; without scales, the weights stand in their place and are not read there."""
    return kernels if isinstance(kernels, ScaledKernels) else (kernels, kernels)


def _launch(
    plan: ProductPlan, tile_rows: int, num_tiles: int, d_in: int, width: int, kernels: Kernels, added: bool
) -> dict[str, Any]:
    """Arguments of both products. What is added to scaled sums takes registers beside them: their blocks are half."""
    scaled = isinstance(kernels, ScaledKernels)
    columns = plan.block_n // 2 if scaled and added else plan.block_n
    block_n, block_k = (min(block, max(16, triton.next_power_of_2(size)))
                        for block, size in ((columns, width), (plan.block_k, d_in)))  # fmt: skip
    return {
        "grid": (num_tiles * triton.cdiv(width, block_n),), "num_warps": plan.warps, "num_stages": plan.stages,
        "D_IN": d_in, "WIDTH": width, "BLOCK_M": tile_rows, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "STAGES": plan.stages, "SCALED": scaled, "ADDED": added,
    }  # fmt: skip
