"""How adapters are sharded: the parts together are the adapter; the extra pages are bounded."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters import BaseGeometry, LoraAdapter, LoraConfig, pack_tiles, unpack_tiles
from slora_jax.parallel.layout import LORA_SHARDINGS, Shards

HEAD_DIM = 4


@st.composite
def geometries(draw: st.DrawFn) -> BaseGeometry:
    """Draws base models of 2, 4 or 8 shards, with own KV heads or heads shared by neighbours."""
    count = draw(st.sampled_from([2, 4, 8]))
    kv_parts = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= count]))
    kv_heads = kv_parts * (draw(st.integers(1, 2)) if kv_parts == count else 1)
    groups = draw(st.integers(1, 2)) * count // kv_parts
    return BaseGeometry(
        num_layers=2,
        hidden_size=count * draw(st.integers(1, 9)),
        q_width=groups * kv_heads * HEAD_DIM,
        kv_width=kv_heads * HEAD_DIM,
        intermediate_size=count * draw(st.integers(1, 9)),
        page_size=draw(st.sampled_from([8, 16])),
        shards=Shards(count, kv_parts, draw(st.sampled_from(LORA_SHARDINGS))),
    )


def adapter_with_ranks(geometry: BaseGeometry, ranks: np.ndarray) -> LoraAdapter:
    """Returns an adapter whose weights are distinct and positive."""
    a, b, scales = {}, {}, {}
    number = iter(np.arange(1, 2**24, dtype=np.float32))
    for layer, index in zip(*np.nonzero(ranks), strict=True):
        key, rank = (int(layer), PROJECTIONS[index]), int(ranks[layer, index])
        d_in, d_out = geometry.dims(key[1])
        a[key] = np.array([next(number) for _ in range(rank * d_in)], np.float32).reshape(rank, d_in)
        b[key] = np.array([next(number) for _ in range(rank * d_out)], np.float32).reshape(d_out, rank)
        scales[key] = 1.0
    return LoraAdapter(config=LoraConfig(), a=a, b=b, scales=scales, ranks=ranks)


def kv_columns(geometry: BaseGeometry, shard: int) -> slice:
    """Returns the columns of the shard's own heads, or of the head that it shares."""
    heads, count = geometry.kv_width // HEAD_DIM, geometry.shards.count
    first, number = (shard * heads // count, heads // count) if heads >= count else (shard // (count // heads), 1)
    return slice(first * HEAD_DIM, (first + number) * HEAD_DIM)


@given(geometry=geometries(), data=st.data())
def test_shards_hold_the_parts_of_the_papers_partition(geometry, data):
    ranks = np.array(data.draw(st.lists(st.integers(0, 11), min_size=14, max_size=14)), np.int32).reshape(2, 7)
    ranks[0, 0] = max(ranks[0, 0], 1)
    adapter = adapter_with_ranks(geometry, ranks)
    tiles = pack_tiles(adapter, geometry, "float32")
    count, lora = geometry.shards.count, geometry.shards.lora
    assert tiles.pages.shape[-1] == count * geometry.layout.width
    nonzero = 0
    for shard in range(count):
        for (layer, projection), (a, b) in unpack_tiles(tiles, geometry, shard).items():
            full = int(tiles.ranks[PROJECTIONS.index(projection)])
            d_in, d_out = geometry.dims(projection)
            whole_a, whole_b = np.zeros((full, d_in), np.float32), np.zeros((full, d_out), np.float32)
            if (layer, projection) in adapter.a:
                own = len(adapter.a[layer, projection])
                whole_a[:own], whole_b[:own] = adapter.a[layer, projection], adapter.b[layer, projection].T
            by_columns = projection not in ("o", "down")
            inputs = slice(None)
            if not by_columns or lora == "sharded_in":
                inputs = slice(shard * d_in // count, (shard + 1) * d_in // count)
            outputs = slice(shard * d_out // count, (shard + 1) * d_out // count)
            if projection in ("k", "v"):
                outputs = kv_columns(geometry, shard)
            elif not by_columns and lora == "replicated":
                outputs = slice(None)
            want_a = whole_a[:, inputs]
            if by_columns and lora == "slora":  # rows are dealt in turn; a zero row where none is left
                rows = np.zeros((-(-full // count), d_in), np.float32)
                dealt = whole_a[shard::count]
                rows[: len(dealt)] = dealt
                want_a = rows
            np.testing.assert_array_equal(a, want_a)
            np.testing.assert_array_equal(b, whole_b[:, outputs])
            nonzero += np.count_nonzero(want_a) + np.count_nonzero(whole_b[:, outputs])
    assert np.count_nonzero(tiles.pages) == nonzero  # the padding is zero


@given(
    count=st.sampled_from([2, 4, 8]),
    ranks=st.lists(st.integers(0, 130), min_size=7, max_size=7),
    page_size=st.sampled_from([8, 16, 32]),
)
def test_indivisible_ranks_waste_at_most_one_row_block(count, ranks, page_size):
    one = BaseGeometry(1, 4096, 4096, 1024, 14336, page_size)
    cut = dataclasses.replace(one, shards=Shards(count, count))
    places, on_one = (g.layout.stack_tiles(np.array(ranks))[0] for g in (cut, one))
    for stack, whole, place, before in zip(cut.layout.stacks, one.layout.stacks, places, on_one, strict=True):
        total = sum(ranks[i] for i in stack.rank_index)
        shares = count if stack.name in ("qkv", "gate_up") else 1
        assert -(-int(place.a_rows) // page_size) <= -(-total // (shares * page_size)) + 1
        assert (place.rows, place.wide_blocks) == (before.rows, before.wide_blocks)
        assert cut.layout.b_chunks(stack) == one.layout.b_chunks(whole)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_adapter_takes_few_more_pages_over_several_shards(count):
    whole = BaseGeometry(32, 4096, 4096, 1024, 14336, 16)
    cut = dataclasses.replace(whole, shards=Shards(count, count))
    for rank in (16, 32, 64, 128):
        pages, on_shards = (int(g.layout.num_pages(np.full(7, rank))) for g in (whole, cut))
        print(f"rank {rank}: {pages} pages, of {count} shards {on_shards}")
        assert pages <= on_shards <= pages * (1 + 16 * count / rank)


def test_replicated_parts_take_their_multiple_of_pages():
    ranks = np.full(7, 64)
    one = BaseGeometry(32, 4096, 4096, 1024, 14336, 16)
    cut = {kind: dataclasses.replace(one, shards=Shards(4, 4, kind)) for kind in LORA_SHARDINGS}
    pages = {kind: int(g.layout.num_pages(ranks)) for kind, g in cut.items()}
    assert pages["slora"] == pages["sharded_in"] == int(one.layout.num_pages(ranks))
    elements = 64 * (3 + 2 + 1 + 1) * 4096  # A of q, k, v, gate, up; B of o and down
    assert pages["replicated"] - pages["slora"] == elements * 3 // 4 // (2 * 16 * 256)
