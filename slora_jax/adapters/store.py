"""Host store for thousands of adapters of one base model, in tile form, by name and by digest.

A name is a pointer to content, and content is identified by its digest. Content lives while a name points to it or a
running request has acquired it, so requests keep the old weights when a name is reloaded with new ones.
"""

from __future__ import annotations

import difflib
import re
import warnings
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from tqdm import tqdm

from pallas_kernels.lora.layout import VECTORS
from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.config import MAX_RANK
from slora_jax.adapters.contents import AdapterContents
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.peft_format import is_adapter, misplaced, read_peft
from slora_jax.adapters.tiles import AdapterTiles, pack_tiles, tile_dtype, tile_shape
from slora_jax.adapters.untrusted.quoting import quoted
from slora_jax.adapters.vectors import BaseWeights
from slora_jax.errors import AdapterError, UnknownAdapterError

_QUANTISED = re.compile(
    r"([-_.](unsloth|bnb|nf4|[48]bit|gptq|awq|autoround|int[48]|fp8|dynamic|w[48]a(8|16)|quantized|q[48]|g128))+$"
)
"""The end of a model's name that names a quantisation."""


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
      rank: the largest of `ranks`.
      ranks: `[7]`, each projection's largest rank over the layers, in the order of `PROJECTIONS`.
      num_pages: size in the pool.
      nbytes: size in host memory.
      extras: what makes it more than plain LoRA, for example `("use_dora", "head")`.
      invocation: tokens from which on an activated LoRA acts; empty: it acts on every token.
      layout_ranks: `ranks`, with the extras if there are any (`pallas_kernels.lora.layout`).
    """

    name: str
    digest: str
    rank: int
    ranks: tuple[int, ...]
    num_pages: int
    nbytes: int
    extras: tuple[str, ...] = ()
    layout_ranks: tuple[int, ...] = ()
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoreStats:
    """Counters of an `AdapterStore`.

    Attributes:
      registered: names.
      resident_bytes: bytes of tiles in memory.
      spilled: contents on disk only.
      spill_writes: spill files written since the store was made.
      spill_reads: spill files read since the store was made.
    """

    registered: int
    resident_bytes: int
    spilled: int
    spill_writes: int
    spill_reads: int


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter whose content is in the store although `info.name` does not point to it yet; `source` is the directory
    it was read from, if any."""

    info: AdapterInfo
    source: Path | None


class LoadReport(NamedTuple):
    """Result of `load_directory`: `infos` of the registered adapters, and `(name, error)` of each refused one."""

    infos: list[AdapterInfo]
    errors: list[tuple[str, AdapterError]]


class AdapterStore(AdapterContents):
    """The host tier of adapters: names, and the contents they point to, under one lock. Every method is thread-safe."""

    def __init__(
        self,
        geometry: BaseGeometry,
        dtype: str | np.dtype,
        host_adapter_bytes: int,
        spill_dir: str | Path | None = None,
        *,
        max_lora_rank: int = MAX_RANK,
        max_pages: int | None = None,
        base: BaseWeights | None = None,
        extras: bool = False,
        activated: bool = True,
    ) -> None:
        """Makes an empty store.

        Args:
          dtype: element type of the pool, float32 or bfloat16.
          host_adapter_bytes: bound on the tiles in memory; beyond it the least recently used are spilled.
          spill_dir: parent of the private directory of spill files; None: the system's temporary directory.
          max_lora_rank: adapters with a larger rank in any projection are refused.
          max_pages: adapters that need more pages of the pool are refused; None: no limit.
          base: weights of the base model; None refuses adapters that need them.
          extras: whether adapters that are more than plain LoRA are served.
          activated: whether activated LoRA (aLoRA) is served.
        """
        self.base_names: frozenset[str] = frozenset()
        """Lower-case names of the base model; if empty, adapters of other base models cause no warning."""
        self.base_weights = ""
        """Format of the base model's weights, for that warning."""
        self.geometry = geometry
        self.dtype = tile_dtype(dtype)
        self._max_lora_rank = max_lora_rank
        self._max_pages = max_pages
        self._base, self._extras, self._activated = base, extras, activated
        self._infos: dict[str, AdapterInfo] = {}
        self._prepared: set[PreparedAdapter] = set()
        super().__init__(
            host_adapter_bytes,
            spill_dir,
            lambda directory: self._pack(read_peft(directory, geometry, base=base)),
        )

    def prepare(self, name: str, adapter: str | Path | LoraAdapter) -> PreparedAdapter:
        """Checks and packs an adapter, read from a PEFT directory if `adapter` is a path, and spills others to make
        room. The result keeps the content alive until it is published or discarded.

        Raises AdapterError if the adapter cannot be used or exceeds a limit; the store is unchanged then.
        """
        source = None if isinstance(adapter, LoraAdapter) else Path(adapter)
        if not isinstance(adapter, LoraAdapter):
            adapter = read_peft(adapter, self.geometry, partial(self._check_size, name), self._base)
        adapter.check(self.geometry)
        if adapter.config.alora_invocation_tokens and not self._activated:
            raise AdapterError(
                f"adapter {name!r}: alora_invocation_tokens: needs EngineConfig.lora='paged', found 'merge': merged "
                "weights act on every token"
            )
        self._check_base(name, adapter.config.base_model_name_or_path)
        num_pages, nbytes = self._check_size(name, adapter.layout_ranks)
        ranks = tuple(adapter.layout_ranks.max(axis=0).tolist())
        own, extras = ranks[:VECTORS], adapter.extras
        rank = max(*own, *ranks[VECTORS + 1 :])
        invocation = adapter.config.alora_invocation_tokens or ()
        info = AdapterInfo(name, adapter.digest, rank, own, num_pages, nbytes, extras, ranks, invocation)
        prepared = PreparedAdapter(info, source)
        if not self._pin(prepared, None):
            self._pin(prepared, self._pack(adapter))
        try:
            self._enforce_budget(keep=info.digest)
        except BaseException:  # Ctrl-C
            self.discard(prepared)
            raise
        return prepared

    def publish(self, prepared: PreparedAdapter) -> AdapterInfo:
        """Points the name, new or existing, to the prepared content. Never waits for the disk.

        Raises AdapterError if it was already published or discarded.
        """
        info = prepared.info
        with self._changed:
            self._end_preparation(prepared)
            content = self._content(info.digest)
            content.source = prepared.source or content.source
            self._count(info.digest, names=1, pins=-1)
            replaced = self._infos.get(info.name)
            self._infos[info.name] = info
            if replaced is not None:
                self._count(replaced.digest, names=-1)
        return info

    def discard(self, prepared: PreparedAdapter) -> None:
        """Releases prepared content that will not be published. Raises AdapterError like `publish`."""
        with self._changed:
            self._end_preparation(prepared)
            self._count(prepared.info.digest, pins=-1)

    def load_directory(self, root: str | Path, progress: bool = True, threads: int = 2) -> LoadReport:
        """Registers every adapter directory in `root` under its folder's name, `threads` of them at a time.

        A bad adapter, or one a level too high or too low, is reported without affecting the others. Raises AdapterError
        only if `root` is not a directory.
        """
        root = Path(root)
        if not root.is_dir():
            raise AdapterError(f"{root}: not a directory")
        directories = sorted(filter(is_adapter, root.iterdir()))
        report = LoadReport([], [(name, AdapterError(reason)) for name, reason in misplaced(root).items()])
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(self._register_or_error, directories)
            for directory, result in tqdm(
                zip(directories, results, strict=True),
                total=len(directories),
                desc="loading adapters",
                unit="adapter",
                disable=not progress,
            ):
                if isinstance(result, AdapterInfo):
                    report.infos.append(result)
                else:
                    report.errors.append((directory.name, result))
        return report

    def remove(self, name: str) -> None:
        """Drops a name, and its content unless another name or an `acquire` keeps it. Raises AdapterError if the name
        is unknown."""
        with self._changed:
            info = self._infos.pop(name, None)
            if info is not None:
                self._count(info.digest, names=-1)
                return
            names = list(self._infos)
        raise _unknown(name, names)

    def info(self, name: str) -> AdapterInfo:
        """The adapter that a name points to. Raises AdapterError with the nearest names if the name is unknown."""
        with self._changed:
            info = self._infos.get(name)
            names = list(self._infos) if info is None else []
        if info is None:
            raise _unknown(name, names)
        return info

    def resolve(self, name: str) -> str:
        """The digest that a name points to. Raises AdapterError like `info`."""
        return self.info(name).digest

    def has(self, name: str) -> bool:
        """Returns whether a name is registered."""
        with self._changed:
            return name in self._infos

    def infos(self) -> list[AdapterInfo]:
        """All registered adapters, in order of registration."""
        with self._changed:
            return list(self._infos.values())

    def stats(self) -> StoreStats:
        """A consistent snapshot of the counters."""
        with self._changed:
            return StoreStats(
                registered=len(self._infos),
                resident_bytes=self._resident_bytes,
                spilled=len(self._contents) - len(self._resident),
                spill_writes=self._spill_writes,
                spill_reads=self._spill_reads,
            )

    def close(self) -> None:
        """Drops all names and content, ends the worker and removes the spill files. May be called twice."""
        with self._changed:
            self._infos.clear()
            self._prepared.clear()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pin(self, prepared: PreparedAdapter, tiles: AdapterTiles | None) -> bool:
        """Pins prepared content, inserting `tiles` if given; returns False if it is not in memory and `tiles` is
        None."""
        digest = prepared.info.digest
        with self._changed:
            self._check_open()
            if tiles is not None:
                self._insert(tiles, prepared.source)
            elif digest not in self._resident:
                return False
            self._count(digest, pins=1)
            self._prepared.add(prepared)
            return True

    def _pack(self, adapter: LoraAdapter) -> AdapterTiles:
        return pack_tiles(adapter, self.geometry, self.dtype, self._base)

    def _end_preparation(self, prepared: PreparedAdapter) -> None:
        """Removes `prepared` from the open preparations. The caller holds the lock."""
        if prepared not in self._prepared:
            raise AdapterError(f"adapter {prepared.info.name!r} was published or discarded before; prepare it again")
        self._prepared.remove(prepared)

    def _check_size(self, name: str, ranks: np.ndarray) -> tuple[int, int]:
        """Pages and bytes of an adapter with these `LoraAdapter.layout_ranks`.

        Raises AdapterError if it is too large, or has extras that are not served.
        """
        rank = int(np.delete(ranks, slice(VECTORS, VECTORS + 1), 1).max())
        if not self._extras and ranks.shape[1] > VECTORS:
            raise AdapterError(
                f"adapter {name!r} has DoRA, biases, LoRA on experts, or changes of lm_head or embed_tokens, which "
                "need EngineConfig.adapter_extras=True, found False; it compiles one more program for every batch size"
            )
        if self.geometry.shards.count > 1 and ranks[:, VECTORS + 1 :].any():
            raise AdapterError(
                f"adapter {name!r} changes experts, lm_head or embed_tokens, which needs "
                f"EngineConfig.tensor_parallel_size=1, found {self.geometry.shards.count}; serve it on one device"
            )
        shape = tile_shape(ranks, self.geometry)
        num_pages, nbytes = shape[1], int(np.prod(shape)) * self.dtype.itemsize
        if rank > self._max_lora_rank:
            raise AdapterError(
                f"adapter {name!r} has rank {rank} but max_lora_rank is {self._max_lora_rank}; raise it (at most "
                f"{MAX_RANK})"
            )
        if self._max_pages is not None and num_pages > self._max_pages:
            raise AdapterError(
                f"adapter {name!r} needs {num_pages} pages but the pool has {self._max_pages} for adapters; raise "
                "num_pages (or adapter_pages, if it is set)"
            )
        if nbytes > self.host_adapter_bytes:
            raise AdapterError(
                f"adapter {name!r} needs {nbytes} bytes but host_adapter_bytes is {self.host_adapter_bytes}; "
                f"raise it to at least {nbytes}"
            )
        return num_pages, nbytes

    def _check_base(self, name: str, trained_on: str | None) -> None:
        """Warns if an adapter's config names a different base model, or the same one in another quantisation."""
        *_, last = re.split(r"[/\\]", (trained_on or "").rstrip("/\\").lower())
        if not last or not self.base_names or last in self.base_names:
            return
        trained = f"adapter {name!r}: base_model_name_or_path={quoted(trained_on)}"
        if _QUANTISED.sub("", last) in {_QUANTISED.sub("", base) for base in self.base_names}:
            message = (
                f"{trained} is another quantisation of the base model, whose weights are {self.base_weights} here; "
                "answers can differ from those in training"
            )
        else:
            message = (
                f"{trained} is another name than that of the base model, {' or '.join(sorted(self.base_names))}; if it "
                "was trained on another model, its answers are wrong"
            )
        warnings.warn(message, stacklevel=2)

    def _register_or_error(self, directory: Path) -> AdapterInfo | AdapterError:
        try:
            return self.publish(self.prepare(directory.name, directory))
        except AdapterError as error:
            return error
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            return AdapterError(f"{directory}: {error}")


def _unknown(name: str, names: list[str]) -> UnknownAdapterError:
    near = difflib.get_close_matches(name, _neighbours(name, names), n=3)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else f"; {len(names)} are registered"
    return UnknownAdapterError(f"unknown adapter {name!r}{hint}")


def _neighbours(name: str, names: list[str]) -> list[str]:
    """Candidates for the spelling hint: all names, or the alphabetical neighbours if there are more than 200, since
    comparing with 10,000 names would delay every other request by 0.1 s."""
    if len(names) <= 200:
        return names
    names.sort()
    at = bisect(names, name)
    return names[max(0, at - 100) : at + 100]
