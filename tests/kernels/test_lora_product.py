"""The gathered LoRA product against dense float64 matrices, in a pool whose free pages are NaN."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.lora import PROJECTIONS, AdapterTable, LoraLayout, LoraProduct, LoraTiles
from pallas_kernels.lora.bmm import Padding, paddings, smallest
from pallas_kernels.lora.plan import ExpandPlan, ShrinkPlan

SEEDS, INTERPRETED_SEEDS = range(6), (1,)
SLOTS, TILE_ROWS = 9, 16


@dataclass(frozen=True)
class Shape:
    """A base model's widths, the largest rank of its adapters, and the rows of a step."""

    hidden: int
    q_width: int
    kv_width: int
    ffn: int
    page_size: int
    max_rank: int = 40
    decode_rows: int = 21
    mixed_rows: int = 45

    @property
    def layout(self) -> LoraLayout:
        return decoder_layout(self.hidden, self.q_width, self.kv_width, self.ffn, self.page_size)


# Hidden 2.5 W, q 3 W and ffn 3.5 W; multi-head with W = hidden; a W wider than the lanes of a sum; rank above 100.
GQA = Shape(hidden=40, q_width=48, kv_width=16, ffn=56, page_size=16)
MHA = Shape(hidden=32, q_width=32, kv_width=32, ffn=112, page_size=8)
WIDE = Shape(hidden=128, q_width=256, kv_width=128, ffn=448, page_size=32)
HIGH_RANK = Shape(hidden=24, q_width=32, kv_width=16, ffn=56, page_size=16, max_rank=130)
FEW_ROWS = Shape(hidden=24, q_width=32, kv_width=16, ffn=56, page_size=8, decode_rows=5, mixed_rows=16)

BOTH, DECODE, MIXED = (True, False), (True,), (False,)
# (shape, dtype, implementation, decode); "bits" are bfloat16 in a uint16 pool (`kv_format`). Compiling takes the
# time: shapes and dtypes are spread over the programs.
CASES = {
    f"{name}-{dtype}-{implementation}-{'decode' if decode else 'mixed'}": (shape, dtype, implementation, decode)
    for name, shape, dtype, implementation, regimes in (
        ("gqa", GQA, "float32", "xla", BOTH),
        ("mha", MHA, "float16", "xla", DECODE),
        ("wide", WIDE, "bfloat16", "xla", MIXED),
        ("high_rank", HIGH_RANK, "float32", "xla", MIXED),
        ("few_rows", FEW_ROWS, "float32", "xla", BOTH),
        ("gqa", GQA, "float32", "bmm", BOTH),
        ("mha", MHA, "bfloat16", "bmm", MIXED),
        ("wide", WIDE, "float32", "bmm", DECODE),
        ("high_rank", HIGH_RANK, "float16", "bmm", DECODE),
        ("few_rows", FEW_ROWS, "float32", "bmm", MIXED),
        ("gqa", GQA, "bfloat16", "triton", BOTH),
        ("mha", MHA, "float16", "triton", MIXED),
        ("wide", WIDE, "bfloat16", "triton", DECODE),
        ("high_rank", HIGH_RANK, "bfloat16", "triton", MIXED),
        ("few_rows", FEW_ROWS, "bits", "triton", DECODE),
    )
    for decode in regimes
}
SIMPLE = {
    name: case[1:]
    for name, case in CASES.items()
    if case[0] is GQA and case[1] == ("bfloat16" if case[2] == "triton" else "float32")
}


def simple_shape(implementation: str) -> Shape:
    """The interpreter takes seconds for a few rows."""
    return FEW_ROWS if implementation == "triton" else GQA


simple_cases = pytest.mark.parametrize(("dtype", "implementation", "decode"), SIMPLE.values(), ids=SIMPLE)


def tile_height(shape: Shape, decode: bool, implementation: str) -> int:
    """Triton multiplies low and high tiles in different ways."""
    return min(2 * TILE_ROWS if implementation == "triton" and not decode else TILE_ROWS, shape.mixed_rows)


@cache
def product(shape: Shape, decode: bool, implementation: str, padding: Padding | None = None):
    """The products of all four stacks in one compiled program per dtype."""
    layout = shape.layout
    block = min(64, shape.kv_width)

    @jax.jit
    def run(table, tiles, xs, ys, pool):
        lora = LoraProduct(
            layout,
            table,
            tiles,
            dtype=xs[0].dtype,
            decode=decode,
            tile_rows=tile_height(shape, decode, implementation),
            max_rank=shape.max_rank,
            implementation=implementation,
            interpret=implementation == "triton",
            # Several slices of the input, some of them over two tiles; one item a program, or several.
            shrink_plan=ShrinkPlan(block_k=block, slice_k=2 * block, warps=2, stages=2, programs=7),
            expand_plan=ExpandPlan(block_n=block, warps=2, stages=2, programs=10_000 if decode else 7),
            padding=padding,
        )
        return [lora(x, y, pool, stack) for x, y, stack in zip(xs, ys, layout.stacks, strict=True)]

    return run


def weight_tiles(layout: LoraLayout, matrices: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Tiles `[page_size, W]`: stack by stack those of A, then of B; block by block, chunk by chunk."""
    size, width, tiles = layout.page_size, layout.width, []
    for stack in layout.stacks:
        for side in (0, 1):
            rows = [row for p in stack.projections if p in matrices for row in matrices[p][side]]
            for block in (rows[i : i + size] for i in range(0, len(rows), size)):
                for column in range(0, max(map(len, block)), width):
                    tile = np.zeros((size, width))
                    for row, values in enumerate(block):
                        chunk = values[column : column + width]
                        tile[row, : chunk.size] = chunk
                    tiles.append(tile)
    return tiles


def in_pages(tiles: list[np.ndarray]) -> np.ndarray:
    """Pages `[n, 2, page_size, W]`."""
    return np.reshape(tiles + [0 * tiles[0]] * (len(tiles) % 2), (-1, 2, *tiles[0].shape))


class Adapters:
    """Random adapters in some slots of a table and pages of a pool, in random order, and their dense matrices."""

    def __init__(self, shape: Shape, dtype: str, rng: np.random.Generator, count: int = 6) -> None:
        self.shape, self.layout, self.rng = shape, shape.layout, rng
        self.dtype = np.dtype(jnp.dtype("bfloat16" if dtype == "bits" else dtype))
        ranks = rng.integers(1, 41, (count, 7)) * (rng.random((count, 7)) < 0.7)
        ranks[0] = shape.max_rank * (rng.random(7) < 0.6)
        ranks[1] = 0
        ranks[1, rng.integers(7)] = 1  # a single projection
        self.slots = rng.permutation(SLOTS)[:count]
        self.matrices = dict(zip(self.slots.tolist(), map(self._matrices, ranks), strict=True))

        size, width = shape.page_size, shape.kv_width
        packed = [in_pages(weight_tiles(self.layout, self.matrices[slot])) for slot in self.slots.tolist()]
        largest = int(self.layout.num_pages(np.full(7, shape.max_rank)))
        num_pages = count * largest + 20  # one size for all seeds, so one program
        pool = np.full((num_pages, 2, size, width), np.nan)
        large = min(1e30, float(jnp.finfo(self.dtype).max) / 2)
        pool[0] = rng.choice([-large, large], pool[0].shape)  # the dummy page: any finite garbage
        free = 1 + rng.permutation(num_pages - 1)
        # Rows of the table that describe no adapter any more: live ranks, and pages that others own by now.
        table = rng.integers(1, num_pages, (SLOTS, largest))
        table_ranks = rng.integers(0, shape.max_rank + 1, (SLOTS, 7))
        for slot, pages, r in zip(self.slots, packed, ranks, strict=True):
            ids, free = free[: len(pages)], free[len(pages) :]
            pool[ids] = pages
            table[slot] = 0
            table[slot, : len(ids)] = ids
            table_ranks[slot] = r
        pool = pool.astype(self.dtype)
        self.pool = jnp.asarray(pool.view(np.uint16) if dtype == "bits" else pool)
        self.table = AdapterTable(jnp.asarray(table, jnp.int32), jnp.asarray(table_ranks, jnp.int32))
        self.by_rank = self.slots[np.argsort(-ranks.sum(1), kind="stable")]

    def _matrices(self, ranks: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """projection -> A `[r, d_in]`, B `[r, d_out]` (transposed, scaled), float64 values of the pool's dtype."""
        widths = {p: (s.d_in, d) for s in self.layout.stacks for p, d in zip(s.projections, s.d_outs, strict=True)}
        return {
            p: tuple(self.rng.standard_normal((r, d)).astype(self.dtype).astype(float) for d in widths[p])
            for p, r in zip(PROJECTIONS, ranks.tolist(), strict=True)
            if r
        }

    def inputs(self, rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """x `[rows, d_in]` and y `[rows, d_out]` of every stack."""
        normal = self.rng.standard_normal
        xs = [normal((rows, s.d_in)).astype(self.dtype) for s in self.layout.stacks]
        return xs, [normal((rows, s.d_out)).astype(self.dtype) for s in self.layout.stacks]

    def check(self, outputs: list[jax.Array], xs: list, ys: list, slot_of_row: list[int]) -> None:
        """Rows of a slot get `y + x A B`, rows of slot -1 stay y to the bit. Errors are bounded relative to the sum of
        the absolute values of all terms: 1e-5 (twice that where x A is kept in 16 bits and 16 more), plus one rounding
        of the result to a 16-bit type."""
        rounding = {2: float(jnp.finfo(self.dtype).eps), 4: 0.0}[self.dtype.itemsize]
        sums = 1e-5 if self.dtype.itemsize == 4 else 2e-5
        for stack, out, x, y in zip(self.layout.stacks, outputs, xs, ys, strict=True):
            assert out.dtype == self.dtype and out.shape == y.shape
            out = np.asarray(out)
            for row, slot in enumerate(slot_of_row):
                if slot < 0:
                    np.testing.assert_array_equal(out[row].view(np.uint8), y[row].view(np.uint8), f"row {row}")
                    continue
                expected = y[row].astype(float)
                terms = abs(expected)
                for p, column, d in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
                    if p in self.matrices[slot]:
                        a, b = self.matrices[slot][p]
                        expected[column : column + d] += x[row].astype(float) @ a.T @ b
                        terms[column : column + d] += abs(x[row].astype(float)) @ abs(a.T) @ abs(b)
                error = abs(out[row].astype(float) - expected)
                bound = sums * terms + rounding * abs(expected)
                assert (error <= bound).all(), (stack.name, row, slot, np.nanmax(error / bound), np.isnan(error).sum())


def lora_tiles(
    rows: int, segments: list[tuple[int, int]], num_dense: int, rng: np.random.Generator, tile_rows: int
) -> LoraTiles:
    """Tiles of `segments [(slot, rows)]` from row 0 on, the first `num_dense` of them dense; entries past `num_tiles`
    hold garbage in range."""
    padding = -(-rows // tile_rows) + SLOTS
    tiles, first, row_slot = [], 0, rng.integers(0, SLOTS, rows)
    dense_tiles = dense_rows = 0
    for number, (slot, count) in enumerate(segments):
        if number == num_dense:
            dense_tiles, dense_rows = len(tiles), first
        row_slot[first : first + count] = slot
        tiles += [(slot, first + r, min(tile_rows, count - r)) for r in range(0, count, tile_rows)]
        first += count
    if num_dense == len(segments):
        dense_tiles, dense_rows = len(tiles), first
    entries = np.stack(
        [rng.integers(0, SLOTS, padding), rng.integers(0, rows, padding), np.full(padding, tile_rows)], 1
    )
    if tiles:
        entries[: len(tiles)] = tiles
    slot, first_row, count = jnp.asarray(entries, jnp.int32).T
    scalars = (jnp.int32(n) for n in (len(tiles), dense_tiles, dense_rows, first))
    return LoraTiles(slot, first_row, count, jnp.asarray(row_slot, jnp.int32), *scalars)


def run(
    adapters: Adapters,
    segments: list[tuple[int, int]],
    decode: bool,
    implementation: str = "xla",
    padding: Padding | None = None,
) -> None:
    shape = adapters.shape
    rows = shape.decode_rows if decode else shape.mixed_rows
    slot_of_row = [slot for slot, count in segments for _ in range(count)]
    slot_of_row += [-1] * (rows - len(slot_of_row))
    xs, ys = adapters.inputs(rows)
    num_dense = 0 if decode else int(adapters.rng.integers(0, len(segments) + 1))
    height = min(rows, tile_height(shape, decode, implementation))
    tiles = lora_tiles(rows, segments, num_dense, adapters.rng, height)
    outputs = product(shape, decode, implementation, padding)(adapters.table, tiles, xs, ys, adapters.pool)
    adapters.check(outputs, xs, ys, slot_of_row)


def segments_of(order: np.ndarray, rows: int, decode: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Adapters of `order` with one or several rows each, within `rows`."""
    segments = []
    for slot in order.tolist():
        count = int(rng.choice([1, 1, 2, 5] if decode else [1, 3, TILE_ROWS, TILE_ROWS + 4]))
        count = min(count, rows - sum(c for _, c in segments))
        if count:
            segments.append((slot, count))
    return segments


@pytest.mark.parametrize(("shape", "dtype", "implementation", "decode"), CASES.values(), ids=CASES)
def test_every_row_gets_its_own_adapters_product(shape, dtype, implementation, decode):
    for seed in INTERPRETED_SEEDS if implementation == "triton" else SEEDS:
        print(f"seed {seed}")
        adapters = Adapters(shape, dtype, np.random.default_rng(seed))
        rows = shape.decode_rows if decode else shape.mixed_rows
        order = adapters.by_rank if seed % 2 else adapters.rng.permutation(adapters.slots)
        run(adapters, segments_of(order, rows - seed % 4, decode, adapters.rng), decode, implementation)


@simple_cases
def test_a_step_without_lora_rows_returns_y_to_the_bit(dtype, implementation, decode):
    run(Adapters(simple_shape(implementation), dtype, np.random.default_rng(10)), [], decode, implementation)


@simple_cases
def test_one_adapter_may_have_every_row_of_a_step(dtype, implementation, decode):
    shape = simple_shape(implementation)
    adapters = Adapters(shape, dtype, np.random.default_rng(11))
    run(adapters, [(int(adapters.slots[2]), shape.decode_rows if decode else shape.mixed_rows)], decode, implementation)


@simple_cases
def test_one_row_of_one_adapter_changes_no_other_row(dtype, implementation, decode):
    """Rows without an adapter name a slot whose pages have other owners (NaN here), in the LoRA row's chunk."""
    adapters = Adapters(simple_shape(implementation), dtype, np.random.default_rng(12))
    for slot in adapters.slots.tolist()[: 2 if implementation == "triton" else None]:
        run(adapters, [(slot, 1)], decode, implementation)


@simple_cases
def test_values_of_one_row_reach_no_other_row(dtype, implementation, decode):
    """An overflow in one request stays in that request."""
    shape = simple_shape(implementation)
    adapters = Adapters(shape, dtype, np.random.default_rng(13))
    rows = shape.decode_rows if decode else shape.mixed_rows
    segments = segments_of(adapters.by_rank, rows - 2, decode, adapters.rng)
    height = tile_height(shape, decode, implementation)
    tiles = lora_tiles(rows, segments, 0 if decode else len(segments) // 2, adapters.rng, height)
    xs, ys = adapters.inputs(rows)
    clean = product(shape, decode, implementation)(adapters.table, tiles, xs, ys, adapters.pool)
    xs = [x.copy() for x in xs]
    for x in xs:
        x[1], x[-1] = np.nan, np.inf  # a row with an adapter and one without
    spoilt = product(shape, decode, implementation)(adapters.table, tiles, xs, ys, adapters.pool)
    others = np.arange(rows) != 1
    for one, other in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], np.asarray(other)[others])


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_a_smaller_padding_that_holds_the_step_gives_its_products_too(decode):
    shape = GQA
    rows = shape.decode_rows if decode else shape.mixed_rows
    for number, padding in enumerate(paddings(rows, SLOTS, decode=decode, tile_rows=TILE_ROWS)[:-1][:2]):
        adapters = Adapters(shape, "float32", np.random.default_rng(20 + number))
        count = padding.segments if padding.cut else padding.rows
        segments = [(int(adapters.slots[0]), min(rows - 2, count))]
        segments += [(int(slot), 1) for slot in adapters.slots[1 : min(3, padding.segments)]]
        assert padding.holds([n for _, n in segments])
        run(adapters, segments, decode, "bmm", padding)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize(("tokens", "adapters"), [(1, 4), (21, 9), (64, 64), (64, 3), (256, 64)])
def test_some_padding_holds_every_step_and_the_smallest_is_taken(tokens, adapters, decode, rng):
    shapes = paddings(tokens, adapters, decode=decode, tile_rows=min(32, tokens))
    assert all(p.segments * p.rows >= tokens for p in shapes)
    for _ in range(60):
        cuts = np.sort(rng.integers(0, tokens + 1, rng.integers(1, min(adapters, tokens) + 1)))
        lengths = [n for n in np.diff(cuts, prepend=0).tolist() if n]
        chosen = smallest(shapes, lengths)
        padded = [chosen.rows] * chosen.segments  # brute force: put the pieces, or whole segments, one after the other
        for length in lengths:
            assert length <= chosen.rows or chosen.cut
            while length > 0:
                length -= padded.pop()
        assert not any(p.holds(lengths) for p in shapes if p.segments * p.rows < chosen.segments * chosen.rows)


def test_an_unknown_implementation_is_refused_by_name():
    adapters = Adapters(FEW_ROWS, "float32", np.random.default_rng(14))
    tiles = lora_tiles(4, [], 0, adapters.rng, 4)
    static = {"dtype": "float32", "decode": True, "tile_rows": 4, "max_rank": 8}
    with pytest.raises(NotImplementedError, match="no implementation named 'cuda'; available: 'xla', 'bmm'"):
        LoraProduct(adapters.layout, adapters.table, tiles, **static, implementation="cuda")
    with pytest.raises(NotImplementedError, match="'triton' takes bfloat16 and float16, not float32"):
        LoraProduct(adapters.layout, adapters.table, tiles, **static, implementation="triton")
