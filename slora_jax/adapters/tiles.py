"""An adapter as tiles ready to upload; `pallas_kernels.lora.layout` defines the place of each row."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_kernels.lora.layout import EXPERT_PROJECTIONS, PROJECTIONS, RANKS, Stack, StackTiles, ceil_div
from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.vectors import BaseWeights, FoldedVectors, fold
from slora_jax.errors import AdapterError, ConfigError

_BITS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80)}
"""Tile dtype -> unsigned type of the same size, and the exponent bits that mark NaN and infinity."""


@dataclass(frozen=True, eq=False)
class AdapterTiles:
    """An adapter ready to upload.

    Attributes:
      ranks: `[7]` int32, each projection's largest rank over the layers; `[10]` for an adapter that is more than
        plain LoRA, `[10 + 3 E]` with LoRA on experts (`pallas_kernels.lora.layout`).
      pages: `[num_layers, num_pages, 2, page_size, W]` float32 or bfloat16. Page `p` of every layer is uploaded to the
        same page of the pool. With N shards (`parallel.layout`), shard s owns columns `s * W / N` to `(s + 1) * W / N`.
        Rows beyond a layer's own rank, columns beyond a matrix and an odd last tile are zero.
    """

    digest: str
    ranks: np.ndarray
    pages: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of `pages`."""
        return self.pages.nbytes

    @property
    def num_pages(self) -> int:
        """Pages that the adapter occupies in the pool (the same page ids in every layer)."""
        return self.pages.shape[1]


def tile_dtype(dtype: str | np.dtype) -> np.dtype:
    """The NumPy dtype of tiles; raises ConfigError unless it is float32 or bfloat16."""
    name = "bfloat16" if dtype is ml_dtypes.bfloat16 else str(dtype) if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _BITS:
        raise ConfigError(f"dtype: adapter tiles are float32 or bfloat16, found {name!r}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)


def tile_shape(ranks: np.ndarray, geometry: BaseGeometry) -> tuple[int, int, int, int, int]:
    """Shape of `AdapterTiles.pages` for `LoraAdapter.layout_ranks`."""
    num_pages = int(geometry.layout.num_pages(ranks.max(axis=0)))
    return geometry.num_layers, num_pages, 2, geometry.page_size, geometry.pool_width


def pack_tiles(
    adapter: LoraAdapter, geometry: BaseGeometry, dtype: str | np.dtype, base: BaseWeights | None = None
) -> AdapterTiles:
    """Packs an adapter; the scale is folded into B in float32 before the cast to `dtype`.

    Args:
      base: the base model's weights, which an adapter with vectors needs.

    Raises AdapterError if a matrix does not fit the base model, or a value is not finite in `dtype`.
    """
    adapter.check(geometry)
    dtype = tile_dtype(dtype)
    ranks = adapter.layout_ranks.max(axis=0)  # [7], [10] or [10 + 3 E]
    pages = np.zeros(tile_shape(adapter.layout_ranks, geometry), dtype)
    vectors = None
    assert geometry.shards.count == 1 or not (adapter.ends or adapter.experts)
    if adapter.vectors:
        if base is None:
            raise AdapterError(f"{', '.join(adapter.vectors)}: needs the weights of the base model")
        vectors = fold(adapter, base)
    bits, exponent = _BITS[dtype.name]
    by_shard = _tiles_by_shard(pages.view(bits), geometry)
    layout, page_size = geometry.layout, geometry.page_size
    for stack, place in zip(layout.stacks, layout.stack_tiles(ranks)[0], strict=True):
        if not place.rows:
            continue
        wide_rows = int(place.wide_blocks) * page_size
        narrow = layout.b_chunks(stack)[1] * layout.width
        for shard in range(geometry.shards.count):
            tiles = by_shard[..., shard, :]
            a, b = _stack_rows(adapter, vectors, geometry, stack, place, ranks, dtype, shard)  # [L, rows, columns]
            _cut(a, tiles, int(layout.a_tile(stack, place, 0)))
            _cut(b[:, :wide_rows], tiles, int(layout.b_tile(stack, place, 0)))
            _cut(b[:, wide_rows:, :narrow], tiles, int(layout.b_tile(stack, place, place.wide_blocks)))
    if vectors is not None:
        first = int(layout.stack_tiles(ranks)[1])
        for shard in range(geometry.shards.count):
            rows = _vector_rows(vectors, geometry, dtype, shard)
            by_shard[:, first : first + rows.shape[1], :, shard] = rows
    if adapter.ends:
        for stack, place in zip(layout.ends, layout.end_tiles(ranks)[0], strict=True):
            if stack.name in adapter.ends:
                a, b = _end_rows(*adapter.ends[stack.name], stack, geometry, dtype)
                _cut(a, by_shard[..., 0, :], int(layout.a_tile(stack, place, 0)))
                _cut(b, by_shard[..., 0, :], int(layout.b_tile(stack, place, 0)))
    if adapter.experts:
        _cut_experts(adapter, ranks, by_shard[..., 0, :], geometry, dtype)
    if any((layer & exponent).max() == exponent for layer in by_shard):
        raise AdapterError(f"a weight is not finite in {dtype.name} after multiplication by its scale")
    return AdapterTiles(digest=adapter.digest, ranks=ranks, pages=pages)


def _tiles_by_shard(pages: np.ndarray, geometry: BaseGeometry) -> np.ndarray:
    """A view of `pages` as `[num_layers, tiles, page_size, shards, W / shards]`."""
    width = geometry.layout.width
    return pages.reshape(geometry.num_layers, -1, geometry.page_size, geometry.shards.count, width)


def _stack_rows(
    adapter: LoraAdapter,
    vectors: FoldedVectors | None,
    geometry: BaseGeometry,
    stack: Stack,
    place: StackTiles,
    ranks: np.ndarray,
    dtype: np.dtype,
    shard: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One shard's A rows and scaled, transposed B rows of a stack in every layer, zero-padded to whole tiles.

    Both are bit patterns of `dtype`: NumPy transposes and cuts integers several times faster than bfloat16.
    """
    bits = _BITS[dtype.name][0]
    layout, page_size, width, shards = geometry.layout, geometry.page_size, geometry.layout.width, geometry.shards
    a_rows, rows = (ceil_div(int(n), page_size) * page_size for n in (place.a_rows, place.rows))
    a = np.zeros((geometry.num_layers, a_rows, layout.a_chunks(stack) * width), bits)
    b = np.zeros((geometry.num_layers, rows, layout.b_chunks(stack)[0] * width), bits)
    a_first = first = 0
    with np.errstate(over="ignore"):
        for projection, index in zip(stack.projections, stack.rank_index, strict=True):
            d_in, d_out = geometry.dims(projection)
            inputs, outputs = shards.inputs(projection, d_in, shard), shards.outputs(projection, d_out, shard)
            for layer in range(geometry.num_layers):
                key = (layer, projection)
                if key in adapter.a:
                    own_a = adapter.a[key][shards.ranks(stack, shard), inputs]
                    own_b = adapter.b[key][outputs]
                    scaled = own_b.astype(np.float32, copy=False) * np.float32(adapter.scales[key])
                    if vectors is not None and key in vectors.factor:
                        scaled *= vectors.factor[key][outputs, None]
                    a[layer, a_first : a_first + len(own_a), : own_a.shape[1]] = _bits(own_a, dtype)
                    b[layer, first : first + scaled.shape[1], : len(scaled)] = _bits(scaled, dtype).T
            a_first += int(stack.a_ranks(ranks[index]))
            first += int(ranks[index])
    return a, b


def _end_rows(
    a: np.ndarray, b: np.ndarray, stack: Stack, geometry: BaseGeometry, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of head or embedding in every layer, as bit patterns of `dtype` `[num_layers, rows, columns]`.

    The side of the vocabulary is distributed over the layers. The other one is the same in every layer.
    """
    layout, layers = geometry.layout, geometry.num_layers
    count, part = ceil_div(len(a), layout.page_size) * layout.page_size, layout.vocabulary_columns
    hidden = ceil_div(geometry.hidden_size, layout.width) * layout.width
    sides = []
    for matrix in (a, b.T):  # [r, columns]
        is_split = (matrix is a) == (stack.name == "embed")
        rows = np.zeros((count, layers * part if is_split else hidden), _BITS[dtype.name][0])
        rows[: len(matrix), : matrix.shape[1]] = _bits(matrix, dtype)
        rows = (
            rows.reshape(count, layers, part).swapaxes(0, 1)
            if is_split
            else np.broadcast_to(rows, (layers, *rows.shape))
        )
        sides.append(rows)
    return sides[0], sides[1]


def _cut_experts(
    adapter: LoraAdapter, ranks: np.ndarray, tiles: np.ndarray, geometry: BaseGeometry, dtype: np.dtype
) -> None:
    """Writes the matrices of all experts to `tiles [num_layers, tiles, page_size, W]`. ranks: `[10 + 3 E]`."""
    layout, page_size, bits = geometry.layout.expert, geometry.page_size, _BITS[dtype.name][0]
    experts = ranks[RANKS:].reshape(-1, len(EXPERT_PROJECTIONS))
    first_tile = geometry.layout.expert_tiles(ranks[:RANKS], experts)[0]
    for expert, own in enumerate(np.pad(experts, ((0, 0), (len(PROJECTIONS) - len(EXPERT_PROJECTIONS), 0)))):
        for stack, place in zip(layout.stacks, layout.stack_tiles(own, first_tile[expert])[0], strict=True):
            count = ceil_div(int(place.rows), page_size) * page_size
            a = np.zeros((geometry.num_layers, count, layout.a_chunks(stack) * layout.width), bits)
            b = np.zeros((geometry.num_layers, count, layout.b_chunks(stack)[0] * layout.width), bits)
            first = 0
            for projection, index in zip(stack.projections, stack.rank_index, strict=True):
                for layer in range(geometry.num_layers):
                    if (layer, projection, expert) in adapter.experts:
                        own_a, own_b = adapter.experts[layer, projection, expert]
                        a[layer, first : first + len(own_a), : own_a.shape[1]] = _bits(own_a, dtype)
                        b[layer, first : first + len(own_a), : len(own_b)] = _bits(own_b, dtype).T
                first += int(own[index])
            _cut(a, tiles, int(layout.a_tile(stack, place, 0)))
            _cut(b, tiles, int(layout.b_tile(stack, place, 0)))


def _vector_rows(vectors: FoldedVectors, geometry: BaseGeometry, dtype: np.dtype, shard: int) -> np.ndarray:
    """One shard's tiles of an adapter's vectors, bit patterns of `dtype` `[num_layers, tiles, page_size, W]`."""
    layout, bits = geometry.layout, _BITS[dtype.name][0]
    count = ceil_div(layout.vector_rows, layout.page_size) * layout.page_size
    rows = np.zeros((geometry.num_layers, count, layout.width), bits)
    for stack in layout.stacks:
        first = layout.first_vector_row(stack)
        for projection, d_out in zip(stack.projections, stack.of_base.d_outs, strict=True):
            chunks = ceil_div(d_out, layout.width)
            parts = geometry.shards.base_outputs(projection, geometry.dims(projection)[1])
            kinds = [(first, vectors.scale), (first + layout.vector_rows // 2, vectors.bias)]
            if shard >= len(parts):  # the shards' partial sums are added: shard 0 has the bias
                kinds.pop()
            part = parts[min(shard, len(parts) - 1)]
            for at, kind in kinds:
                for layer in range(geometry.num_layers):
                    if (layer, projection) in kind:
                        own = rows[layer, at : at + chunks].reshape(-1)
                        own[:d_out] = _bits(kind[layer, projection][part], dtype)
            first += chunks
    return rows.reshape(geometry.num_layers, -1, layout.page_size, layout.width)


def _bits(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(values.astype(dtype, copy=False)).view(_BITS[dtype.name][0])


def _cut(rows: np.ndarray, tiles: np.ndarray, first: int) -> None:
    """Writes `rows [L, blocks * page_size, chunks * W]` to `tiles`, block-major, from tile `first` on."""
    layers, num_rows, columns = rows.shape
    page_size, width = tiles.shape[2:]
    blocks, chunks = num_rows // page_size, columns // width
    place = tiles[:, first : first + blocks * chunks].reshape(layers, blocks, chunks, page_size, width)
    place[...] = rows.reshape(layers, blocks, page_size, chunks, width).swapaxes(2, 3)


def unpack_tiles(
    tiles: AdapterTiles, geometry: BaseGeometry, shard: int = 0
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """Reads one shard's matrices back.

    Returns:
      `(layer, projection) -> (A [r, d_in], scaled B transposed [r, d_out])`, where `r` is the projection's largest rank
      over the layers.
    """
    layout = geometry.layout
    own = _tiles_by_shard(tiles.pages, geometry)[..., shard, :]  # [L, tiles, page_size, W / shards]
    matrices = {}
    for stack, place in zip(layout.stacks, layout.stack_tiles(tiles.ranks)[0], strict=True):
        a_blocks, blocks = (ceil_div(int(rows), geometry.page_size) for rows in (place.a_rows, place.rows))
        wide_blocks = int(place.wide_blocks)
        wide, narrow = layout.b_chunks(stack)
        a = _joined(own, int(layout.a_tile(stack, place, 0)), a_blocks, layout.a_chunks(stack))
        b_wide = _joined(own, int(layout.b_tile(stack, place, 0)), wide_blocks, wide)
        b_narrow = _joined(own, int(layout.b_tile(stack, place, wide_blocks)), blocks - wide_blocks, narrow)
        b = np.concatenate([b_wide[..., : b_narrow.shape[2]], b_narrow], 1)  # all rows, the narrow columns
        a_first = first = 0
        for projection, d_out, index in zip(stack.projections, stack.d_outs, stack.rank_index, strict=True):
            rank = int(tiles.ranks[index])
            a_own, own_b = slice(a_first, a_first + int(stack.a_ranks(rank))), slice(first, first + rank)
            from_b = b if d_out <= b.shape[2] else b_wide
            for layer in range(geometry.num_layers if rank else 0):
                matrices[layer, projection] = (a[layer, a_own, : stack.d_in], from_b[layer, own_b, :d_out])
            a_first, first = a_own.stop, own_b.stop
    return matrices


def _joined(tiles: np.ndarray, first: int, blocks: int, chunks: int) -> np.ndarray:
    """The inverse of `_cut`: `[L, blocks * page_size, chunks * W]`, from tile `first` on."""
    layers, _, page_size, width = tiles.shape
    part = tiles[:, first : first + blocks * chunks].reshape(layers, blocks, chunks, page_size, width)
    return part.swapaxes(2, 3).reshape(layers, blocks * page_size, chunks * width)
