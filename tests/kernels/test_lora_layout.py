"""The tile formulas agree with a walk over stacks, blocks and chunks that counts tiles one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.lora import PROJECTIONS, LoraLayout, Stack

PAGE_SIZES = st.sampled_from([8, 16, 32])
RANK = st.one_of(st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64]), st.integers(0, 70))
RANKS = st.lists(RANK, min_size=7, max_size=7)


@st.composite
def decoders(draw) -> LoraLayout:
    """Grouped-query decoders; hidden and intermediate widths need not be multiples of W = kv_width."""
    head_dim, kv_heads, group = draw(st.integers(1, 24)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    kv_width = head_dim * kv_heads
    return decoder_layout(
        hidden_size=draw(st.integers(1, 6 * kv_width)),
        q_width=kv_width * group,
        kv_width=kv_width,
        intermediate_size=draw(st.integers(1, 12 * kv_width)),
        page_size=draw(PAGE_SIZES),
    )


@st.composite
def wide_projections(draw) -> LoraLayout:
    """Stacks whose narrow projections take several column chunks too."""
    width, widths = draw(st.integers(1, 16)), st.integers(1, 70)

    def outs() -> tuple[int, ...]:
        narrow, wide = sorted((draw(widths), draw(widths)))
        return (wide, narrow, narrow)

    stacks = (
        Stack("qkv", ("q", "k", "v"), draw(widths), outs()),
        Stack("o", ("o",), draw(widths), (draw(widths),)),
        Stack("gate_up", ("gate", "up"), draw(widths), outs()[:2]),
        Stack("down", ("down",), draw(widths), (draw(widths),)),
    )
    return LoraLayout(stacks, draw(PAGE_SIZES), width)


def walk(layout: LoraLayout, ranks: list[int]) -> dict[tuple[str, str, int, int], int]:
    """(stack, "A" or "B", row block, column chunk) -> tile number, for all tiles of an adapter, in order."""
    tiles: dict[tuple[str, str, int, int], int] = {}
    for stack in layout.stacks:
        widths = dict(zip(stack.projections, stack.d_outs, strict=True))
        rows = [p for p in stack.projections for _ in range(ranks[PROJECTIONS.index(p)])]  # the projection of each row
        blocks = [rows[i : i + layout.page_size] for i in range(0, len(rows), layout.page_size)]
        for matrix in "AB":
            for number, block in enumerate(blocks):
                columns = stack.d_in if matrix == "A" else max(widths[p] for p in block)
                for chunk, _ in enumerate(range(0, columns, layout.width)):
                    tiles[stack.name, matrix, number, chunk] = len(tiles)
    return tiles


def formulas(layout: LoraLayout, ranks: np.ndarray) -> dict[tuple[str, str, int, int], int]:
    """The same from `LoraLayout`'s formulas, for `ranks [7]`."""
    tiles = {}
    for stack, place in zip(layout.stacks, layout.stack_tiles(ranks)[0], strict=True):
        for block in range(-(-int(place.rows) // layout.page_size)):
            first = int(layout.a_tile(stack, place, block))
            tiles |= {(stack.name, "A", block, c): first + c for c in range(layout.a_chunks(stack))}
            first = int(layout.b_tile(stack, place, block))
            chunks = layout.b_chunks(stack)[0 if block < place.wide_blocks else 1]
            tiles |= {(stack.name, "B", block, c): first + c for c in range(chunks)}
    return tiles


@settings(max_examples=150)
@given(layout=st.one_of(decoders(), wide_projections()), ranks=RANKS)
@example(layout=decoder_layout(40, 48, 16, 56, 8), ranks=[9, 0, 2, 0, 0, 8, 16])
@example(layout=decoder_layout(40, 48, 16, 56, 8), ranks=[0, 3, 0, 0, 0, 0, 0])
@example(layout=decoder_layout(40, 48, 16, 56, 32), ranks=[0] * 7)
def test_formulas_number_tiles_like_a_walk_over_them(layout, ranks):
    tiles = walk(layout, ranks)
    assert formulas(layout, np.array(ranks, np.int32)) == tiles
    assert int(layout.num_tiles(np.array(ranks))) == len(tiles)
    assert int(layout.num_pages(np.array(ranks))) == -(-len(tiles) // 2)


@settings(max_examples=20)
@given(layout=decoders(), many=st.lists(RANKS, min_size=5, max_size=5))
def test_ints_numpy_and_jax_arrays_agree(layout, many):
    as_numpy, as_jax = np.array(many, np.int32), jnp.array(many, jnp.int32)
    (by_numpy, numpy_total), (by_jax, jax_total) = layout.stack_tiles(as_numpy), layout.stack_tiles(as_jax)
    blocks = np.arange(9, dtype=np.int32)  # row blocks past an adapter's end have numbers too, which are not read

    def rows(place: object) -> list[np.ndarray]:
        return [np.asarray(getattr(place, name)) for name in ("a_base", "b_base", "rows", "wide_blocks")]

    for n, ranks in enumerate(many):
        by_int, total = layout.stack_tiles(np.array(ranks))
        assert int(total) == int(numpy_total[n]) == int(jax_total[n]) == int(layout.num_tiles(as_jax)[n])
        assert int(layout.num_pages(as_numpy)[n]) == int(layout.num_pages(as_jax)[n])
        for stack, one, numpy_many, jax_many in zip(layout.stacks, by_int, by_numpy, by_jax, strict=True):
            np.testing.assert_array_equal(rows(one), [field[n] for field in rows(numpy_many)])
            np.testing.assert_array_equal(rows(one), [field[n] for field in rows(jax_many)])
            for tile in (layout.a_tile, layout.b_tile):
                expected = [int(tile(stack, one, int(block))) for block in blocks]
                np.testing.assert_array_equal(tile(stack, one, blocks), expected)
                np.testing.assert_array_equal(tile(stack, one, jnp.asarray(blocks)), expected)


def test_decoder_stacks_have_the_models_widths():
    layout = decoder_layout(hidden_size=40, q_width=48, kv_width=16, intermediate_size=56, page_size=8)
    assert [(s.name, s.d_in, s.d_outs) for s in layout.stacks] == [
        ("qkv", 40, (48, 16, 16)),
        ("o", 48, (40,)),
        ("gate_up", 40, (56, 56)),
        ("down", 56, (40,)),
    ]
    assert [s.d_out for s in layout.stacks] == [80, 40, 112, 40]
    assert [s.columns for s in layout.stacks] == [(0, 48, 64), (0,), (0, 56), (0,)]
    assert [p for s in layout.stacks for p in s.projections] == list(PROJECTIONS)
    assert [i for s in layout.stacks for i in s.rank_index] == list(range(7))
    assert layout.width == 16 and layout.page_size == 8


def test_low_ranks_of_one_stack_share_a_block():
    """q, k, v of rank 5 at page size 16: one block of A (3 chunks) and one of B (3 chunks), not three of each."""
    layout = decoder_layout(hidden_size=40, q_width=48, kv_width=16, intermediate_size=56, page_size=16)
    assert layout.num_tiles(np.array([5, 5, 5, 0, 0, 0, 0])) == 6
    assert layout.num_pages(np.array([5, 5, 6, 0, 0, 0, 0])) == 3
    assert layout.num_tiles(np.array([0, 5, 5, 0, 0, 0, 0])) == 4  # without q, B is one chunk wide
    assert layout.num_tiles(np.array([6, 5, 6, 0, 0, 0, 0])) == 10  # the 17th row is v's: 2 * 3 of A, 3 + 1 of B


def test_a_large_adapter_does_not_change_the_pages_of_a_small_one():
    layout = decoder_layout(64, 64, 32, 112, 16)
    together = layout.num_pages(np.array([[8] * 7, [128] * 7]))
    assert together[0] == layout.num_pages(np.array([8] * 7)) < together[1] / 5


@pytest.mark.parametrize("d_outs", [(16, 32, 32), (48, 16, 32)])
def test_a_stack_whose_widest_projection_is_not_first_is_refused(d_outs):
    with pytest.raises(ValueError, match=r"stack qkv: output widths .* must be widest first, the rest equal"):
        Stack("qkv", ("q", "k", "v"), 40, d_outs)
