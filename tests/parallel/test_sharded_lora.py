"""Adapter products over shards against dense float64 matrices: every layout, ranks not divisible by N."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles
from slora_jax.adapters import BaseGeometry, LoraAdapter, pack_tiles, random_adapter
from slora_jax.models.projections import ROW_PARALLEL
from slora_jax.parallel.layout import Shards
from slora_jax.parallel.lora import add_lora
from slora_jax.parallel.mesh import AXIS, POOL, make_mesh

PAGE_SIZE, ROWS, TILE_ROWS, MAX_RANK, DEGREE = 8, 20, 8, 19, 4
RANKS = ({"q": 19, "k": 3, "o": 5, "gate": 1, "up": 18, "down": 2}, 6, {"v": 1, "down": 19}, {"q": 9})
SEGMENTS = ((2, 5), (0, 9), (3, 1), (1, 3))  # adapter slot and rows; the last rows have none


class Batch:
    """One layer's pool with every adapter in random pages, tables, tiles, and rows of x and y for each stack."""

    def __init__(self, shards: Shards, dtype: str, seed: int) -> None:
        print(f"seed {seed}")
        self.rng = np.random.default_rng(seed)
        # Heads of 16: W_s = 16 at four shards; hidden and intermediate of a shard are no multiples of it.
        self.geometry = BaseGeometry(1, 96, 128, 64, 160, PAGE_SIZE, shards)
        self.adapters: list[LoraAdapter] = [random_adapter(self.geometry, r, seed=i) for i, r in enumerate(RANKS)]
        packed = [pack_tiles(adapter, self.geometry, dtype) for adapter in self.adapters]
        num_pages = 1 + sum(tiles.num_pages for tiles in packed)
        self.pool = self.rng.standard_normal((num_pages, 2, PAGE_SIZE, self.geometry.pool_width)).astype(
            packed[0].pages.dtype
        )
        free = iter(1 + self.rng.permutation(num_pages - 1))
        pages = np.zeros((len(packed), max(tiles.num_pages for tiles in packed)), np.int32)
        for slot, tiles in enumerate(packed):
            ids = list(itertools.islice(free, tiles.num_pages))
            self.pool[ids] = tiles.pages[0]
            pages[slot, : len(ids)] = ids
        self.table = AdapterTable(jnp.asarray(pages), jnp.asarray([tiles.ranks for tiles in packed]))
        entries = np.zeros((8, 3), np.int32)
        row_slot, first, count = np.zeros(ROWS, np.int32), 0, 0
        for slot, rows in SEGMENTS:
            row_slot[first : first + rows] = slot
            for row in range(0, rows, TILE_ROWS):
                entries[count] = slot, first + row, min(TILE_ROWS, rows - row)
                count += 1
            first += rows
        scalars = (jnp.int32(n) for n in (count, 0, 0, first))
        self.tiles = LoraTiles(*jnp.asarray(entries.T), jnp.asarray(row_slot), *scalars)
        self.slot_of_row = [slot for slot, rows in SEGMENTS for _ in range(rows)] + [-1] * (ROWS - first)

    def normal(self, width: int) -> np.ndarray:
        return self.rng.standard_normal((ROWS, width)).astype(self.pool.dtype)

    def delta(self, projection: str, x: np.ndarray) -> np.ndarray:
        """`x A B` of every row, float64, from the adapters themselves."""
        out = np.zeros((ROWS, self.geometry.dims(projection)[1]))
        for row, slot in enumerate(self.slot_of_row):
            key = (0, projection)
            if slot >= 0 and key in self.adapters[slot].a:
                adapter = self.adapters[slot]
                a, b = (m[key].astype(self.pool.dtype).astype(float) for m in (adapter.a, adapter.b))
                out[row] = adapter.scales[key] * (b @ (a @ x[row].astype(float)))
        return out


def split_product(batch: Batch, implementation: str) -> LoraProduct:
    return LoraProduct(
        batch.geometry.layout,
        batch.table,
        batch.tiles,
        dtype=batch.pool.dtype,
        decode=False,
        tile_rows=TILE_ROWS,
        max_rank=MAX_RANK,
        split=True,
        implementation=implementation,  # type: ignore[arg-type]
        interpret=implementation != "xla",
    )


def fused(batch: Batch, stack: object, parts: list[np.ndarray]) -> np.ndarray:
    """Outputs of a stack's projections as the shards hold them: one shard's fused columns after the other's."""
    shards = batch.geometry.shards
    return np.concatenate(
        [
            part[:, shards.outputs(projection, part.shape[1], shard)]
            for shard in range(shards.count)
            for projection, part in zip(stack.projections, parts, strict=True)
        ],
        axis=1,
    )


@pytest.mark.parametrize(("lora", "kv_parts"), [("slora", 2), ("slora", 4), ("replicated", 2), ("sharded_in", 4)])
def test_every_layout_adds_each_rows_adapter(lora, kv_parts):
    shards = Shards(DEGREE, kv_parts, lora)
    batch = Batch(shards, "float32", seed=0)
    mesh, layout = make_mesh(DEGREE), batch.geometry.layout

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), POOL), out_specs=P(None, AXIS), check_vma=False)
    def run(xs, ys, pool):
        product, outputs = split_product(batch, "xla"), []
        shard = jax.lax.axis_index(AXIS)
        for stack, x, y in zip(layout.stacks, xs, ys, strict=True):
            if stack.name in ROW_PARALLEL:
                own = jax.lax.dynamic_slice_in_dim(x, shard * stack.d_in, stack.d_in, axis=1)
                partial_sum = jnp.where(shard == 0, y, 0)
                outputs.append(jax.lax.psum(add_lora(product, shards, own, partial_sum, pool, stack), AXIS))
            else:
                own = jax.lax.dynamic_slice_in_dim(y, shard * stack.d_out, stack.d_out, axis=1)
                outputs.append(add_lora(product, shards, x, own, pool, stack))
        return outputs

    dims = batch.geometry.dims
    xs = [batch.normal(dims(stack.projections[0])[0]) for stack in layout.stacks]
    parts = [[batch.normal(dims(p)[1]) for p in stack.projections] for stack in layout.stacks]
    ys = [
        one[0] if stack.name in ROW_PARALLEL else fused(batch, stack, one)
        for stack, one in zip(layout.stacks, parts, strict=True)
    ]
    for stack, x, one, out in zip(layout.stacks, xs, parts, run(xs, ys, batch.pool), strict=True):
        expected = [y + batch.delta(p, x) for p, y in zip(stack.projections, one, strict=True)]
        if stack.name in ROW_PARALLEL:  # every shard has the sum
            want = np.concatenate(expected * DEGREE, axis=1)
        else:
            want = fused(batch, stack, expected)
        np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=stack.name)


def test_triton_shrinks_and_expands_interleaved_ranks():
    """Runs one shard after another on one device, and assembles their exchange by hand."""
    shards = Shards(DEGREE, DEGREE)
    batch = Batch(shards, "bfloat16", seed=1)
    product, width = split_product(batch, "triton"), batch.geometry.layout.width
    pools = [jnp.asarray(batch.pool[..., s * width : (s + 1) * width]) for s in range(DEGREE)]
    stack = batch.geometry.layout.stacks[0]
    x, parts = batch.normal(96), [batch.normal(batch.geometry.dims(p)[1]) for p in stack.projections]
    h = [np.asarray(product.shrink(jnp.asarray(x), pool, stack)) for pool in pools]  # [T, 3, 5] each
    dealt = np.zeros((ROWS, 3, 5 * DEGREE), h[0].dtype)
    for shard in range(DEGREE):
        dealt[:, :, shard::DEGREE] = h[shard]
    y = fused(batch, stack, parts)
    want = fused(batch, stack, [part + batch.delta(p, x) for p, part in zip(stack.projections, parts, strict=True)])
    for shard, pool in enumerate(pools):
        columns = slice(shard * stack.d_out, (shard + 1) * stack.d_out)
        out = product.expand(jnp.asarray(dealt), jnp.asarray(y[:, columns]), pool, stack)
        error = np.abs(np.asarray(out).astype(float) - want[:, columns])
        assert error.max() < 0.02 * np.abs(want).max()  # x A goes over in 16 bits, and so does y
        base = [row for row, slot in enumerate(batch.slot_of_row) if slot < 0]
        np.testing.assert_array_equal(np.asarray(out)[base].view(np.uint16), y[base][:, columns].view(np.uint16))


def test_the_padded_baseline_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="'bmm' multiplies padded copies of A and B"):
        split_product(Batch(Shards(DEGREE, DEGREE), "bfloat16", seed=2), "bmm")
