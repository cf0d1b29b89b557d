"""Cases of paged attention: decode over contexts and batches, and steps with prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Case, Program, System, chain
from pallas_kernels.bench.pools import random_array, random_pages, random_pools
from pallas_kernels.bench.size import Size
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention
from pallas_kernels.paged_attention.roofline import attention_work
from pallas_kernels.roofline import Work

DTYPE = jnp.bfloat16
TOLERANCE = 1e-2
"""Of checks: bfloat16's error, far below that of one wrong row."""
REFERENCE_TOKENS = 2**20
"""Most tokens of context that the reference is measured with; beyond, it takes seconds."""

Sequences = tuple[tuple[int, int, int], ...]
"""`(count, rows, context)` of the sequences of a step."""


@dataclass(frozen=True)
class Grid:
    """The measured shapes.

    Attributes:
      contexts, batches: tokens and sequences of decode steps.
      main_batch: the goal's batch.
      prefill_rows, prefill_seqs: most rows and sequences of steps with prefill.
      prefill: the sequences of steps with prefill, by name.
      check: the sequences of their check.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    main_batch: int
    prefill_rows: int
    prefill_seqs: int
    prefill: dict[str, Sequences]
    check: Sequences


FULL = Grid(
    contexts=(512, 1024, 2048, 4096, 8192, 16384, 32768),
    batches=(1, 4, 16, 64, 256),
    main_batch=64,
    prefill_rows=4096,
    prefill_seqs=64,
    prefill={
        "one prompt": ((1, 4096, 0),),
        "eight prompts": ((8, 512, 0),),
        "four later chunks": ((4, 1024, 4096),),
        "last chunk of 32k": ((1, 4096, 28672),),
        "prompt and 63 decoding": ((1, 4033, 0), (63, 1, 4096)),
    },
    check=((1, 1000, 0), (2, 333, 777), (1, 1, 0), (20, 1, 1234), (1, 64, 16), (1, 1500, 3000)),
)
MINIATURE = Grid(
    contexts=(16, 32),
    batches=(2,),
    main_batch=2,
    prefill_rows=16,
    prefill_seqs=4,
    prefill={"prompt and 2 decoding": ((1, 14, 0), (2, 1, 9))},
    check=((1, 9, 3), (1, 1, 20)),
)


@dataclass(frozen=True)
class Shape:
    """Static shape of a program: at most `rows` rows of `seqs` sequences. decode: one row each."""

    size: Size
    rows: int
    seqs: int
    decode: bool

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends to measure. The miniature's heads are narrower than Mosaic GPU's tiles."""
        return ("triton",) if self.decode or self.size.miniature else ("triton", "mosaic_gpu")

    @property
    def tile_rows(self) -> int:
        return min(self.rows, 64)

    @property
    def pool(self) -> tuple[int, int, int, int]:
        """Shape of a layer's pool."""
        return self.size.pool_pages, 2, self.size.page_size, self.size.model.width

    @property
    def q(self) -> tuple[int, int, int]:
        """Shape of the queries."""
        return self.rows, self.size.model.num_heads, self.size.model.head_dim

    def structs(self, layers: int) -> tuple[Any, ...]:
        """Shapes of `(q, pools, tiles)`."""
        q, pool = jax.ShapeDtypeStruct(self.q, DTYPE), jax.ShapeDtypeStruct(self.pool, DTYPE)
        empty = Batch(self, np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
        tiles = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), empty.tiles(np.random.default_rng(0)))
        return q, (pool,) * layers, tiles


@dataclass(frozen=True, eq=False)
class Batch:
    """A step's sequences: rows and tokens before them, int32 `[n]`. poisoned: other pages are NaN."""

    shape: Shape
    lengths: np.ndarray
    contexts: np.ndarray
    seed: int
    poisoned: bool = False

    @property
    def work(self) -> Work:
        model = self.shape.size.model
        return attention_work(
            self.lengths, self.contexts, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, itemsize=DTYPE.dtype.itemsize,
        )  # fmt: skip

    def tiles(self, rng: np.random.Generator) -> AttentionTiles:
        """Tiles with pages in random order."""
        shape, size, n = self.shape, self.shape.size, self.lengths.size
        table = np.zeros((shape.seqs, ceil_div(size.max_context, size.page_size)), np.int32)
        counts = ceil_div(self.contexts + self.lengths, size.page_size)
        ids = random_pages(int(counts.sum()), size.pool_pages, rng)
        for seq, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            table[seq, :count] = ids[end - count : end]
        first_row, length, context, decode_seq = np.zeros((4, shape.seqs), np.int32)
        first_row[:n], length[:n], context[:n] = np.cumsum(self.lengths) - self.lengths, self.lengths, self.contexts
        decoding = np.flatnonzero(length == 1)
        decode_seq[: decoding.size] = decoding[np.argsort(-context[decoding], kind="stable")]
        entries = 0 if shape.decode else ceil_div(shape.rows, shape.tile_rows) + shape.seqs
        prefill = [(s, row) for s in np.flatnonzero(length > 1) for row in range(0, length[s], shape.tile_rows)]
        tiles = np.zeros((entries, 2), np.int32)
        tiles[: len(prefill)] = np.array(prefill, np.int32).reshape(-1, 2)
        arrays = (table, first_row, length, context, *tiles.T, len(prefill), decode_seq, decoding.size)
        return AttentionTiles(*(jnp.asarray(np.array(a), jnp.int32) for a in arrays))

    def q(self) -> jax.Array:
        return random_array(self.shape.q, self.seed + 1000)

    def arguments(self, layers: int) -> list[tuple[Any, ...]]:
        """`(pools, tiles)` for enough sets of pages to exceed every cache."""
        size, rng = self.shape.size, np.random.default_rng(self.seed)
        if self.poisoned:
            tiles = self.tiles(rng)
            owned = jnp.zeros(size.pool_pages, bool).at[tiles.page_table.ravel()].set(True)
            pool = random_array(self.shape.pool, self.seed)
            return [((jnp.where(owned[:, None, None, None], pool, jnp.nan),), tiles)]
        pools = random_pools(self.shape.pool, size.layers, self.seed)[:layers]
        sets = ceil_div(size.cache_bytes, layers * self.work.bytes)
        return [(pools, self.tiles(rng)) for _ in range(sets)]


@cache
def attention(shape: Shape, backend: str, layers: int) -> Program:
    """`(q, pools, tiles) -> q`: each layer's output is the next one's query."""

    def run(q: jax.Array, pools: Any, tiles: AttentionTiles) -> jax.Array:
        size, model = shape.size, shape.size.model
        attend = PagedAttention(
            tiles, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
            page_size=size.page_size, dtype=DTYPE, decode=shape.decode, tile_rows=shape.tile_rows,
            implementation=backend, interpret=size.miniature and backend != "xla",  # type: ignore[arg-type]
        )  # fmt: skip
        for pool in pools:
            q = attend(q, pool)
        return q

    name = f"attention-{'decode' if shape.decode else 'prefill'}-{shape.rows}-{backend}-{layers}"
    return Program(name, jax.jit(run, donate_argnums=0), partial(shape.structs, layers))


def system(batch: Batch, backend: str, layers: int) -> System:
    """A backend's system."""
    start = chain(batch.q, partial(batch.arguments, layers))
    return System(backend, attention(batch.shape, backend, layers), start, repeats=layers)


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return [*_checks(size, grid, seed), *_decode(size, grid, seed), *_prefill(size, grid, seed)]


def _checks(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    """Checks at timed shapes, in one layer whose other pages are NaN."""
    batch, longest = grid.main_batch, max(context for _, _, context in grid.check)
    contexts = np.random.default_rng(seed).integers(0, longest, batch - batch // 4)
    decode = Batch(Shape(size, batch, batch, True), np.ones_like(contexts), contexts, seed, True)
    mixed = _sequences(Shape(size, grid.prefill_rows, grid.prefill_seqs, False), grid.check, seed, poisoned=True)
    for regime, step in (("decode", decode), ("prefill", mixed)):
        systems = tuple(system(step, backend, 1) for backend in ("xla", *step.shape.backends))
        facts = {"rows": step.shape.rows, "sequences": step.lengths.size}
        yield Case("attention", regime, facts, step.work, systems, tolerance=TOLERANCE)


def _decode(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    for batch in sorted(grid.batches, key=lambda n: n != grid.main_batch):
        for context in grid.contexts:
            step = _sequences(Shape(size, batch, batch, True), ((batch, 1, context - 1),), seed)
            facts = {"model": size.model.name, "batch": batch, "context": context}
            importance = 0 if batch == grid.main_batch else 1
            yield Case("attention", "decode", facts, step.work, _systems(step), importance)


def _prefill(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    for name, sequences in grid.prefill.items():
        step = _sequences(Shape(size, grid.prefill_rows, grid.prefill_seqs, False), sequences, seed)
        facts = {"model": size.model.name, "rows": grid.prefill_rows, "sequences": name}
        yield Case("attention", "prefill", facts, step.work, _systems(step), importance=1)


def _systems(step: Batch) -> tuple[System, ...]:
    size = step.shape.size
    systems = [system(step, backend, size.layers) for backend in step.shape.backends]
    if (tokens := int(step.contexts.sum())) <= REFERENCE_TOKENS:
        systems.append(system(step, "xla", 1))
    else:
        systems.append(System("xla", skip=f"takes seconds over {tokens} tokens; measured up to {REFERENCE_TOKENS}"))
    return tuple(systems)


def _sequences(shape: Shape, sequences: Sequences, seed: int, poisoned: bool = False) -> Batch:
    lengths = np.concatenate([np.full(count, rows, np.int32) for count, rows, _ in sequences])
    contexts = np.concatenate([np.full(count, context, np.int32) for count, _, context in sequences])
    if lengths.sum() > shape.rows or lengths.size > shape.seqs:
        raise ValueError(f"{sequences} are more than {shape.rows} rows or {shape.seqs} sequences")
    return Batch(shape, lengths, contexts, seed, poisoned)
