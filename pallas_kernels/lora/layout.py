"""The tile layout of adapters: the single definition shared by the host packer and every kernel.

An adapter is a list of tiles `[page_size, width]`, two to a page (design: "The unified pool"). Projections that read
the same input form a *stack*: their A matrices `[r_p, d_in]` are concatenated row-wise into one matrix of `R = sum r_p`
rows, and so are their transposed, scaled B matrices `[r_p, d_out_p]`. Row `j` of the A stack and row `j` of the B stack
belong together: `y += (x @ A[j]) * B[j]`. A stack is cut into row blocks of `page_size` rows (low ranks of several
projections share a block) and column chunks of `width`; each piece is one tile.

Order of an adapter's tiles: stack by stack; in a stack first the A tiles, block-major, then the B tiles, block-major.
A block of B has as many column chunks as its widest projection needs. An adapter may also have *vectors*, a scale and a
bias for every output column: each is cut into rows of `width` columns, which fill further tiles. LoRA on the output
head and on the token embedding follows. The columns of the vocabulary are distributed over the layers, because a page
is the same row in every layer. LoRA on experts comes last: the tiles of each expert are those of an adapter of its own,
with the stacks of an expert. All functions accept ints or integer arrays (NumPy or JAX) as ranks, so the device derives
the same numbers as the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Every projection that can carry LoRA, in the order of all rank vectors `[..., 7]`."""

VECTORS = len(PROJECTIONS)
"""Position in a rank vector `[..., 10]` of the number that is 1 if the adapter has vectors."""

ENDS = ("head", "embed")
"""LoRA on the output head and on the token embedding, the last numbers of a rank vector `[..., 10]`."""

_RANKS = (*PROJECTIONS, "vectors", *ENDS)
"""What the numbers of a rank vector stand for. An adapter of plain LoRA may have a vector `[..., 7]` of the first."""

RANKS = len(_RANKS)
"""Length of a rank vector with everything but experts."""

EXPERT_PROJECTIONS = PROJECTIONS[-3:]
"""The projections of an expert. The ranks of E experts, `[E, 3]`, follow in a rank vector `[..., 10 + 3 E]`."""


def ceil_div(a: Any, b: int) -> Any:
    """`a / b` rounded up; `a` is an int or an integer array."""
    return -(-a // b)


def tile_rows(page_size: int, kv_dtype: str) -> int:
    """Rows of a tile: a page of `page_size` tokens has the bytes of two tiles. Keys and values of one byte ("fp8" or
    "int8") halve a page, and so a tile of 16-bit weights; "auto": keys, values and weights have one dtype."""
    return page_size if kv_dtype == "auto" else page_size // 2


def _blocks(rows: Any, size: int) -> Any:
    """`ceil_div` of numbers >= 0: two compiled operations instead of a dozen that handle signs."""
    if _is_traced(rows):
        from jax import lax

        return lax.div(rows + (size - 1), lax.full_like(rows, size))
    return ceil_div(rows, size)


def _column(ranks: Any, index: int) -> Any:
    """`ranks[..., index]`, which would compile to a gather."""
    if _is_traced(ranks):
        from jax import lax

        return lax.index_in_dim(ranks, index, -1, keepdims=False)
    return ranks[..., index]


def _is_traced(a: Any) -> bool:
    """Returns whether `a` is a JAX array, without importing JAX: the command line imports this module first."""
    return hasattr(a, "aval")


@dataclass(frozen=True)
class Stack:
    """Projections that read the same input.

    Attributes:
      d_in: width of the input.
      d_outs: output widths in the order of the fused base output. The first is the widest and the others are equal, so
        that only blocks with rows of the first need its number of column chunks.
      rank_shards: number of shards over which the rows of A are interleaved. Each shard holds `ceil(r / rank_shards)`
        rows of a projection of rank r (the last may be zero), and all r rows of B.
      out_shards: number of shards among which the columns of B are divided although each shard's base output, a partial
        sum, has all columns.
    """

    name: str
    projections: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]
    rank_shards: int = 1
    out_shards: int = 1

    def __post_init__(self) -> None:
        if len(set(self.d_outs[1:])) > 1 or max(self.d_outs) != self.d_outs[0]:
            raise ValueError(f"stack {self.name}: output widths {self.d_outs} must be widest first, the rest equal")

    @property
    def d_out(self) -> int:
        """Width of the fused base output `[T, d_out]`."""
        return sum(self.d_outs)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """First column of each projection in the fused base output."""
        return tuple(sum(self.d_outs[:i]) for i in range(len(self.d_outs)))

    @cached_property
    def rank_index(self) -> tuple[int, ...]:
        """Indices of this stack's projections in a rank vector."""
        return tuple(_RANKS.index(p) for p in self.projections)

    @cached_property
    def of_base(self) -> Stack:
        """The stack with the widths of the base output, which vectors have."""
        if self.out_shards == 1:
            return self
        return replace(self, d_outs=tuple(self.out_shards * d for d in self.d_outs), out_shards=1)

    def a_ranks(self, rank: Any) -> Any:
        """Rows of A per shard of a projection of rank `rank`."""
        return rank if self.rank_shards == 1 else ceil_div(rank, self.rank_shards)


@dataclass(frozen=True)
class StackTiles:
    """Tile numbers of one stack within one adapter (or, with arrays, within many adapters).

    Attributes:
      a_base, b_base: first A and first B tile, counted from the adapter's first tile.
      a_rows, rows: rows of A, and of B (R, the stack's total rank). They differ only if A is sharded by rank.
      wide_blocks: blocks of B with a row of the widest projection.
    """

    a_base: Any
    b_base: Any
    a_rows: Any
    rows: Any
    wide_blocks: Any


@dataclass(frozen=True)
class LoraLayout:
    """Tile geometry of every adapter of one base model.

    Attributes:
      stacks: the stacks of a layer.
      page_size: rows of a tile.
      width: columns of a tile, the pool's W.
      num_layers, vocab_size: only for LoRA on head and embedding.
      experts, expert_width: number of experts of a layer, and the width of an expert's hidden layer; only for LoRA on
        experts.
    """

    stacks: tuple[Stack, ...]
    page_size: int
    width: int
    num_layers: int = 1
    vocab_size: int = 0
    experts: int = 0
    expert_width: int = 0

    def a_chunks(self, stack: Stack) -> int:
        return ceil_div(stack.d_in, self.width)

    def b_chunks(self, stack: Stack) -> tuple[int, int]:
        """Column chunks of a B block with, and without, a row of the stack's widest projection."""
        return ceil_div(stack.d_outs[0], self.width), ceil_div(stack.d_outs[-1], self.width)

    def stack_tiles(self, ranks: Any, base: Any = 0) -> tuple[tuple[StackTiles, ...], Any]:
        """Returns the tile numbers of every stack for `ranks [..., 7]`, from tile `base` on, and the tile after the
        last `[...]`: without `base`, the adapter's number of tiles."""
        rank_of = {i: _column(ranks, i) for i in range(len(PROJECTIONS))}
        return self._place(self.stacks, rank_of, base + 0 * rank_of[0])

    def end_tiles(self, ranks: Any) -> tuple[tuple[StackTiles, ...], Any]:
        """Returns the tile numbers of `ends` for `ranks [..., 10]`, and the adapter's number of tiles `[...]`."""
        vectors = _column(ranks, VECTORS) * ceil_div(self.vector_rows, self.page_size)
        rank_of = {i: _column(ranks, i) for i in range(VECTORS + 1, RANKS)}
        return self._place(self.ends, rank_of, self.stack_tiles(ranks)[1] + vectors)

    def _place(
        self, stacks: tuple[Stack, ...], rank_of: Mapping[int, Any], base: Any
    ) -> tuple[tuple[StackTiles, ...], Any]:
        """Places stacks from tile `base` on. Returns their tile numbers, and the tile after the last."""
        tiles = []
        for stack in stacks:
            rows = sum(rank_of[i] for i in stack.rank_index)
            blocks = a_blocks = _blocks(rows, self.page_size)
            a_rows = rows
            if stack.rank_shards > 1:
                a_rows = sum(stack.a_ranks(rank_of[i]) for i in stack.rank_index)
                a_blocks = _blocks(a_rows, self.page_size)
            wide_blocks = _blocks(rank_of[stack.rank_index[0]], self.page_size)
            wide, narrow = self.b_chunks(stack)
            b_base = base + a_blocks * self.a_chunks(stack)
            tiles.append(StackTiles(base, b_base, a_rows, rows, wide_blocks))
            base = b_base + wide_blocks * wide + (blocks - wide_blocks) * narrow
        return tuple(tiles), base

    def a_tile(self, stack: Stack, tiles: StackTiles, block: Any) -> Any:
        """Tile of column chunk 0 of A's row block `block`; chunk `c` is the c-th tile after it."""
        return tiles.a_base + block * self.a_chunks(stack)

    def b_tile(self, stack: Stack, tiles: StackTiles, block: Any) -> Any:
        """Tile of column chunk 0 of B's row block `block`; chunk `c` is the c-th tile after it."""
        wide, narrow = self.b_chunks(stack)
        in_wide = block * wide
        after_wide = tiles.wide_blocks * wide + (block - tiles.wide_blocks) * narrow
        return tiles.b_base + in_wide + (block >= tiles.wide_blocks) * (after_wide - in_wide)

    @cached_property
    def vocabulary_columns(self) -> int:
        """Columns of the vocabulary that lie in each layer: whole chunks of `width`."""
        return ceil_div(ceil_div(self.vocab_size, self.width), self.num_layers) * self.width

    @cached_property
    def ends(self) -> tuple[Stack, Stack]:
        """Stacks of `ENDS` in one layer: A of the head and B of the embedding are whole, the others have the layer's
        part of the vocabulary."""
        d_model, part = self.stacks[0].d_in, self.vocabulary_columns
        return Stack("head", ("head",), d_model, (part,)), Stack("embed", ("embed",), part, (d_model,))

    @cached_property
    def expert(self) -> LoraLayout:
        """The layout of an adapter of one expert."""
        d_model, width = self.stacks[0].d_in, self.expert_width
        gate, up, down = EXPERT_PROJECTIONS
        stacks = Stack("gate_up", (gate, up), d_model, (width, width)), Stack("down", (down,), width, (d_model,))
        return LoraLayout(stacks, self.page_size, self.width)

    def expert_tiles(self, ranks: Any, experts: Any) -> tuple[Any, Any]:
        """Returns the first tile of every expert `[..., E]`, and the adapter's number of tiles `[...]`.

        Args:
          ranks: `[..., 10]`.
          experts: `[..., E, 3]`, the rank of each of `EXPERT_PROJECTIONS`.
        """
        rank_of = {PROJECTIONS.index(p): _column(experts, i) for i, p in enumerate(EXPERT_PROJECTIONS)}
        counts = self.expert._place(self.expert.stacks, rank_of, 0 * experts[..., 0])[1]
        ends = self.end_tiles(ranks)[1][..., None] + counts.cumsum(-1)
        return ends - counts, ends[..., -1]

    @cached_property
    def vector_rows(self) -> int:
        """Rows of an adapter's vectors: the scales of every stack's column chunks, then the biases."""
        return 2 * sum(self.output_chunks(stack.of_base) for stack in self.stacks)

    def output_chunks(self, stack: Stack) -> int:
        """Column chunks of a stack's output, each projection rounded up to whole chunks."""
        return sum(ceil_div(d_out, self.width) for d_out in stack.d_outs)

    def first_vector_row(self, stack: Stack) -> int:
        """Row of the scale of a stack's first column chunk; the bias lies `vector_rows / 2` rows after it."""
        return sum(self.output_chunks(one.of_base) for one in self.stacks[: self.stacks.index(stack)])

    def num_tiles(self, ranks: Any) -> Any:
        """Tiles of an adapter with `ranks [..., 7]`, `[..., 10]` or `[..., 10 + 3 E]` in one layer."""
        if ranks.shape[-1] > RANKS:
            experts = ranks[..., RANKS:].reshape(*ranks.shape[:-1], self.experts, len(EXPERT_PROJECTIONS))
            return self.expert_tiles(ranks[..., :RANKS], experts)[1]
        return self.end_tiles(ranks)[1] if ranks.shape[-1] == RANKS else self.stack_tiles(ranks)[1]

    def num_pages(self, ranks: Any) -> Any:
        """Pages of an adapter with ranks as in `num_tiles`: `ceil(tiles / 2)`."""
        return ceil_div(self.num_tiles(ranks), 2)
