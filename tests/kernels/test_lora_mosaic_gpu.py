"""The Mosaic GPU kernels of the LoRA product: interpreted, against float64 matrices; and compiled for an absent H200.

Free pages of the pool, unwritten outputs and shared memory are NaN. The interpreter checks every access for races. It
supports every primitive of the kernels.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_shapes import LAYERS
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.devices import DEVICES, compiling_for
from pallas_kernels.lora import PROJECTIONS, LoraLayout, LoraTiles, mosaic_gpu
from pallas_kernels.lora.plan import ExpandPlan, ShrinkPlan, expand_plan, shrink_plan
from pallas_kernels.lora.work import FIELDS, stack_work
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.analysis import kernels_in

_, _, LLAMA_3_8B, SHARD_OF_70B, QWEN3_8B = LAYERS
SLOTS = 7
SHRINK = ShrinkPlan(block_r=64, block_k=128, slice_k=128, warps=4, stages=3)
EXPAND = ExpandPlan(block_r=64, block_n=128, span_n=256, warps=4, stages=2)


@dataclass(frozen=True)
class Case:
    """A base model's widths, and `segments`: (rank of every projection or None for no adapter, rows) in row order."""

    layout: LoraLayout
    stack: int
    segments: tuple[tuple[tuple[int, ...] | None, int], ...]
    rows: int
    tile_rows: int
    max_rank: int
    shrink: ShrinkPlan = SHRINK
    expand: ExpandPlan = EXPAND
    dtype: str = "bfloat16"


def qkv(q: int, k: int, v: int) -> tuple[int, ...]:
    return (q, k, v, 3, 0, 2, 1)


def ffn(gate: int, up: int, down: int = 0) -> tuple[int, ...]:
    return (1, 0, 2, 0, gate, up, down)


def decoder(page_size: int, width: int = 128, hidden: int = 256) -> LoraLayout:
    return decoder_layout(hidden, 2 * width, width, 3 * width, page_size)


# Together the cases take every branch of both kernels; the plans, dtypes and page sizes are spread over them.
CASES = {
    # Base-only rows before and after; adapters that lack some projections or all; one row and a full tile.
    "decode": Case(
        decoder(16), 0, ((None, 3), (qkv(8, 8, 8), 1), (qkv(0, 0, 64), 1), (qkv(33, 1, 17), 8), (qkv(0, 0, 0), 1)),
        rows=16, tile_rows=8, max_rank=64,
    ),
    "small_pages_wide_pool": Case(
        decoder(8, width=256), 3, ((ffn(0, 0, 12), 16), (ffn(0, 0, 64), 2)),
        rows=18, tile_rows=16, max_rank=64, shrink=replace(SHRINK, slice_k=256),
    ),
    "large_pages_high_rank_one_stage": Case(
        decoder(32), 0, ((qkv(130, 16, 40), 2), (qkv(1, 0, 0), 1)), rows=3, tile_rows=8, max_rank=144, dtype="float16",
        shrink=replace(SHRINK, stages=1), expand=ExpandPlan(64, 64, 256, 4, 1),
    ),
    "prefill": Case(
        decoder(16), 2, ((ffn(16, 7), 69), (None, 3)), rows=72, tile_rows=64, max_rank=64,
        shrink=ShrinkPlan(128, 64, 256, 4, 4), expand=ExpandPlan(64, 128, 128, 4, 3),
    ),
}  # fmt: skip


class Problem:
    """A pool with the case's adapters in random pages, the step's tile list, and the dense matrices."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, self.rng = case, rng
        self.layout, self.stack = case.layout, case.layout.stacks[case.stack]
        self.dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
        page_size, width = self.layout.page_size, self.layout.width
        slots = rng.permutation(SLOTS)
        self.matrices, self.slot_of_row, packed, tiles = {}, [], {}, []
        ranks = rng.integers(0, case.max_rank, (SLOTS, 7))  # rows of the table that describe no adapter any more
        for slot, (rank, rows) in zip(slots.tolist(), case.segments, strict=False):
            if rank is not None:
                ranks[slot] = rank
                self.matrices[slot] = self._matrices(rank)
                packed[slot] = self._pack(self.matrices[slot])
                for first in range(0, rows, case.tile_rows):
                    tiles.append((slot, len(self.slot_of_row) + first, min(case.tile_rows, rows - first)))
            self.slot_of_row += [slot if rank is not None else -1] * rows
        self.slot_of_row += [-1] * (case.rows - len(self.slot_of_row))
        total = sum(map(len, packed.values()))
        pool = np.full((total + 5, 2, page_size, width), np.nan)
        pool[0] = rng.choice([-1e4, 1e4], pool[0].shape)  # the dummy page: any finite garbage
        free = 1 + rng.permutation(len(pool) - 1)
        table = rng.integers(1, len(pool), (SLOTS, max(map(len, packed.values()), default=0) + 2))
        for slot, pages in packed.items():
            ids, free = free[: len(pages)], free[len(pages) :]
            pool[ids] = pages
            table[slot, : len(ids)] = ids
        self.pool, self.pages = jnp.asarray(pool.astype(self.dtype)), jnp.asarray(table, jnp.int32)
        live = len(tiles)
        tiles += [(int(slots[0]), 0, case.tile_rows)] * 2  # past the list's end
        slot, first_row, rows = (jnp.asarray(column, jnp.int32) for column in zip(*tiles, strict=True))
        work = LoraTiles(slot, first_row, rows, slot, *(jnp.int32(live),) * 4)
        self.work = stack_work(self.layout, jnp.asarray(ranks, jnp.int32), work)[case.stack]
        self.x = rng.standard_normal((case.rows, self.stack.d_in)).astype(self.dtype)
        self.y = rng.standard_normal((case.rows, self.stack.d_out)).astype(self.dtype)

    def _matrices(self, rank: tuple[int, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """projection -> A `[r, d_in]` and transposed B `[r, d_out]`, values of the pool's dtype."""
        widths = {p: (s.d_in, d) for s in self.layout.stacks for p, d in zip(s.projections, s.d_outs, strict=True)}
        return {
            p: tuple(self.rng.standard_normal((r, d)).astype(self.dtype).astype(float) for d in widths[p])
            for p, r in zip(PROJECTIONS, rank, strict=True)
        }

    def _pack(self, matrices: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Pages `[n, 2, page_size, W]`: stack by stack the tiles of A, then of B; block by block, chunk by chunk."""
        size, width, tiles = self.layout.page_size, self.layout.width, []
        for stack in self.layout.stacks:
            for side in (0, 1):
                rows = [row for p in stack.projections for row in matrices[p][side]]
                for block in (rows[i : i + size] for i in range(0, len(rows), size)):
                    for column in range(0, max(map(len, block)), width):
                        tile = np.zeros((size, width))
                        for row, values in enumerate(block):
                            chunk = values[column : column + width]
                            tile[row, : chunk.size] = chunk
                        tiles.append(tile)
        tiles += [np.full((size, width), np.nan)] * (len(tiles) % 2)  # the last page's second half is never read
        return np.reshape(tiles, (-1, 2, size, width))

    def run(self) -> np.ndarray:
        case = self.case
        h = mosaic_gpu.lora_shrink(
            jnp.asarray(self.x), self.pool, self.pages, self.work, self.layout, self.stack,
            max_rank=case.max_rank, tile_rows=case.tile_rows, plan=case.shrink, interpret=True,
        )  # fmt: skip
        assert not gpu_callbacks.get_races().races_found
        out = mosaic_gpu.lora_expand(
            h, jnp.asarray(self.y), self.pool, self.pages, self.work, self.layout, self.stack,
            tile_rows=case.tile_rows, plan=case.expand, interpret=True,
        )  # fmt: skip
        assert not gpu_callbacks.get_races().races_found
        return np.asarray(out)

    def check(self, out: np.ndarray) -> None:
        """Rows of an adapter get `y + x A B`, the others stay y to the bit. Errors are bounded relative to the sum of
        the absolute values of all terms, 1e-5, plus one rounding of the result."""
        rounding = float(ml_dtypes.finfo(self.dtype).eps)
        for row, slot in enumerate(self.slot_of_row):
            expected = self.y[row].astype(float)
            terms = abs(expected)
            if slot < 0:
                np.testing.assert_array_equal(out[row].view(np.uint8), self.y[row].view(np.uint8), f"row {row}")
                continue
            for p, column, d in zip(self.stack.projections, self.stack.columns, self.stack.d_outs, strict=True):
                a, b = self.matrices[slot][p]
                expected[column : column + d] += self.x[row].astype(float) @ a.T @ b
                terms[column : column + d] += abs(self.x[row].astype(float)) @ abs(a.T) @ abs(b)
            error = abs(out[row].astype(float) - expected)
            bound = 1e-5 * terms + rounding * abs(expected)
            assert (error <= bound).all(), (row, slot, np.nanmax(error / bound), np.isnan(error).sum())


@pytest.mark.parametrize("name", CASES)
def test_rows_get_their_adapters_product_and_other_rows_stay(name, rng):
    problem = Problem(CASES[name], rng)
    problem.check(problem.run())


# One of each entry of the plan table: short and long inputs in decode steps, and a mixed step.
@pytest.mark.parametrize(
    ("layer", "number", "decode"),
    [(QWEN3_8B, 2, True), (LLAMA_3_8B, 3, True), (SHARD_OF_70B, 0, False)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_compiled_kernels_use_tensor_cores_and_bulk_copies_without_spills(layer, number, decode):
    layout, shape = layer.layout(), jax.ShapeDtypeStruct
    stack = layout.stacks[number]
    tokens, tiles, tile_rows = (64, 68, 8) if decode else (2048, 96, 64)
    facts = {"backend": "mosaic_gpu", "decode": decode, "rows": tokens, "width": layout.width}
    shrink, expand = shrink_plan(d_in=stack.d_in, **facts), expand_plan(d_out=stack.d_out, **facts)

    def layers(x, y, pools, pages, work):
        for pool in pools:
            common = pool, pages, work, layout, stack
            h = mosaic_gpu.lora_shrink(x, *common, max_rank=64, tile_rows=tile_rows, plan=shrink)
            y = mosaic_gpu.lora_expand(h, y, *common, tile_rows=tile_rows, plan=expand)
        return y

    x, y = shape((tokens, stack.d_in), jnp.bfloat16), shape((tokens, stack.d_out), jnp.bfloat16)
    pools = [shape((4000, 2, 16, layout.width), jnp.bfloat16)] * 2
    pages, work = shape((256, 300), jnp.int32), shape((tiles, len(FIELDS)), jnp.int32)
    program = compile_for(TARGETS["h200"], jax.jit(layers, donate_argnums=1), x, y, pools, pages, work)

    memory = program.memory_analysis()
    h_bytes = 4 * tokens * shrink.splits(stack.d_in) * 64 * len(stack.projections)
    assert memory.alias_size_in_bytes == y.size * 2  # in place,
    assert memory.temp_size_in_bytes <= 2 * h_bytes  # and no copy of y
    kernels = kernels_in(program, DEVICES["h200"])
    assert [(kernel.name, kernel.count) for kernel in kernels] == [("lora_expand", 2), ("lora_shrink", 2)]
    for kernel in kernels:
        assert kernel.spill_bytes == 0 and kernel.registers <= 128 and kernel.shared_bytes <= 200_000
        assert "wgmma.mma_async" in kernel.ptx and "cp.async.bulk.tensor.5d.shared" in kernel.ptx


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "weights of float32"),
        ({"width": 96}, "multiples of 64"),
        ({"device": "a100"}, "a100; available: Hopper"),
        ({"stages": 40}, "bytes of shared memory"),
    ],
)
def test_unsupported_shapes_are_declined_with_the_reason(change, reason):
    layout, shape = decoder(16, width=change.get("width", 128)), jax.ShapeDtypeStruct
    stack, dtype = layout.stacks[0], change.get("dtype", jnp.bfloat16)
    plan = replace(SHRINK, stages=change.get("stages", 3))

    def shrink(x, pool, pages, work):
        return mosaic_gpu.lora_shrink(x, pool, pages, work, layout, stack, max_rank=8, tile_rows=8, plan=plan)

    pool = shape((3, 2, 16, layout.width), dtype)
    with compiling_for(DEVICES[change.get("device", "h200")]), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(shrink, shape((8, stack.d_in), dtype), pool, shape((1, 9), jnp.int32), shape((1, 9), jnp.int32))
