"""The training pool: float32 weights, gradient and moments of the adapters in training, in the tiles of serving.

An adapter takes only the pages that its true ranks need, so memory grows with the adapters' bytes. B is stored without
its scale, as PEFT trains it; `scales` has the factor of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np

from pallas_kernels.lora import PROJECTIONS
from slora_jax.adapters import AdapterTiles, BaseGeometry, LoraAdapter, LoraConfig, pack_tiles, unpack_tiles
from slora_jax.adapters.peft_format import adapter_of
from slora_jax.adapters.targets import Target, resolve_targets
from slora_jax.adapters.tensor_names import FUSED, PLAIN
from slora_jax.errors import AdapterError
from slora_jax.memory import PageAllocator, PageKind
from slora_jax.memory.pool import Pool, PoolShape, describe, pieces, upload_pages

Targets = Mapping[tuple[int, str], Target]

Matrices = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]
"""A `[r, d_in]` and B `[d_out, r]`, or their gradients, by layer and projection."""


def trained_targets(config: LoraConfig, num_layers: int) -> Targets:
    """Resolves a config to what is trained. Raises AdapterError like `resolve_targets`, and for a fused module: its
    projections have one A, but each projection is trained with its own."""
    named = () if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    for module, projections in FUSED.items():
        fused = module.split(".")[-1]
        if any(name.split(".")[-1] == fused for name in named):
            single = ", ".join(PLAIN[projection].split(".")[-1] for projection in projections)
            raise AdapterError(
                f"target_modules: {fused!r} is a fused module; it can be served but not trained. Train {single}"
            )
    return resolve_targets(config, num_layers)


def initial_adapter(config: LoraConfig, geometry: BaseGeometry, seed: int) -> LoraAdapter:
    """PEFT's initialisation: A uniform in `±1 / sqrt(d_in)`, B zero. Raises AdapterError like `trained_targets`."""
    targets = trained_targets(config, geometry.num_layers)
    a, b = {}, {}
    for (layer, projection), target in targets.items():
        d_in, d_out = geometry.dims(projection)
        random = np.random.default_rng([seed, layer, PROJECTIONS.index(projection)])
        bound = 1 / np.sqrt(d_in)
        a[layer, projection] = random.uniform(-bound, bound, (target.rank, d_in)).astype(np.float32)
        b[layer, projection] = np.zeros((d_out, target.rank), np.float32)
    return adapter_of(config, targets, a, b, geometry.num_layers)


def largest_ranks(targets: Targets) -> np.ndarray:
    """Each projection's largest rank over the layers, int32 `[7]`."""
    ranks = np.zeros(len(PROJECTIONS), np.int32)
    for (_, projection), target in targets.items():
        index = PROJECTIONS.index(projection)
        ranks[index] = max(ranks[index], target.rank)
    return ranks


class TrainingPool:
    """The device arrays of all adapters in training, and the allocation of their pages.

    Attributes:
      master, gradient, mu, nu: a float32 array `[num_pages, 2, page_size, W]` per layer each.
      scales: float32 `[num_pages, 2, page_size, 1]` per layer: a row's LoRA scale if it belongs to B, else 1.
      table: the pages and ranks of each slot.
    """

    STATE = ("master", "mu", "nu")
    """What continues a training bit by bit; the gradient is empty after a step."""

    def __init__(
        self, geometry: BaseGeometry, num_pages: int, slots: int, max_rank: int, device: jax.sharding.Sharding
    ) -> None:
        self.geometry = geometry
        most = int(geometry.layout.num_pages(np.full(len(PROJECTIONS), max_rank)))
        shape = PoolShape(
            geometry.num_layers, num_pages, geometry.page_size, geometry.layout.width, "float32", slots,
            min(most, num_pages - 1),
        )  # fmt: skip
        self.allocator = PageAllocator(num_pages)
        self.page_bytes = shape.page_bytes
        self.master, self.gradient, self.mu, self.nu = (shape.make_pool(device) for _ in range(4))
        self.scales: Pool = replace(shape, width=1).make_pool(device)
        self.table = shape.make_table(device)

    def add(self, slot: int, adapter: LoraAdapter) -> np.ndarray:
        """Writes an adapter's weights, with zero gradient and moments. Returns its pages. There must be room."""
        keys = adapter.a.keys()
        weights = pack_tiles(replace(adapter, scales=dict.fromkeys(keys, 1.0)), self.geometry, "float32")
        pages = self.allocator.allocate(weights.num_pages, PageKind.ADAPTER)
        ones = replace(
            adapter,
            a={key: np.ones_like(matrix) for key, matrix in adapter.a.items()},
            b={key: np.ones_like(matrix) for key, matrix in adapter.b.items()},
        )
        self.write("scales", pages, pack_tiles(ones, self.geometry, "float32").pages[..., :1])
        self.write("master", pages, weights.pages)
        for name in ("gradient", "mu", "nu"):
            self.write(name, pages, np.zeros_like(weights.pages))
        self.table = describe(self.table, slot, pages, weights.ranks)
        return pages

    def remove(self, slot: int, pages: np.ndarray) -> None:
        """Frees an adapter's pages."""
        self.allocator.free(pages)
        self.table = describe(self.table, slot, np.empty(0, np.int32), np.zeros(len(PROJECTIONS), np.int32))

    def write(self, name: str, pages: np.ndarray, contents: np.ndarray) -> None:
        """Replaces pages of one of the arrays by `contents [num_layers, n, 2, page_size, columns]`."""
        pool = getattr(self, name)
        for piece in pieces(0, pages.size):
            pool = upload_pages(pool, pages[piece], contents[:, piece])
        setattr(self, name, pool)

    def read(self, name: str, pages: np.ndarray) -> np.ndarray:
        """Copies pages of one of the arrays to the host: `[num_layers, n, 2, page_size, W]`."""
        padded = np.zeros(self.table.pages.shape[1], np.int32)
        padded[: pages.size] = pages
        layers = [_take(layer, padded) for layer in getattr(self, name)]
        return np.stack([np.asarray(layer)[: pages.size] for layer in layers])

    def adapter(self, config: LoraConfig, targets: Targets, ranks: np.ndarray, pages: np.ndarray) -> LoraAdapter:
        """The present weights of an adapter; `ranks [7]` are the largest over the layers."""
        matrices = self._matrices(self.read("master", pages), targets, ranks)
        a = {key: matrix for key, (matrix, _) in matrices.items()}
        b = {key: matrix for key, (_, matrix) in matrices.items()}
        return adapter_of(config, targets, a, b, self.geometry.num_layers)

    def gradient_of(self, targets: Targets, ranks: np.ndarray, pages: np.ndarray) -> Matrices:
        """The accumulated gradient of an adapter."""
        return self._matrices(self.read("gradient", pages) * self.read("scales", pages), targets, ranks)

    def _matrices(self, contents: np.ndarray, targets: Targets, ranks: np.ndarray) -> Matrices:
        whole = unpack_tiles(AdapterTiles("", ranks, contents), self.geometry)
        matrices = {}
        for key, target in targets.items():
            a, b = whole[key]
            matrices[key] = np.ascontiguousarray(a[: target.rank]), np.ascontiguousarray(b[: target.rank].T)
        return matrices


@jax.jit
def _take(layer: jax.Array, pages: jax.Array) -> jax.Array:
    return layer[pages]
