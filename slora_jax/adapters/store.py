"""Thousands of adapters of one base model in host memory, in tile form, known by name and by digest.

A name is a pointer to content; content is known by its digest. Content lives while a name points to it or a running
request pins it, so reloading a name with new weights never disturbs, or is mistaken for, the old ones.
"""

from __future__ import annotations

import difflib
import re
import threading
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

from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.config import MAX_RANK
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.host_cache import DiskObserver, HostCache, Tier
from slora_jax.adapters.peft_format import is_adapter, misplaced, read_peft
from slora_jax.adapters.quoting import quoted
from slora_jax.adapters.tiles import AdapterTiles, pack_tiles, tile_dtype, tile_shape
from slora_jax.errors import AdapterError, UnknownAdapterError


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter. `ranks` are the largest over the layers, in the order of `PROJECTIONS`; `rank` is the
    largest of them. `num_pages` is its size in the pool; `nbytes` its size in host memory."""

    name: str
    digest: str
    rank: int
    ranks: tuple[int, ...]
    num_pages: int
    nbytes: int


@dataclass(frozen=True)
class StoreStats:
    """Counters. `registered` names; `resident_bytes` of tiles in memory; `spilled` contents that are not in memory;
    `spill_writes` and `spill_reads` of files since the store was made."""

    registered: int
    resident_bytes: int
    spilled: int
    spill_writes: int
    spill_reads: int


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter whose content is in the store while no name points to it yet. `info.name` is the name it is for;
    `source` is its directory, if it was read from one."""

    info: AdapterInfo
    source: Path | None


class LoadReport(NamedTuple):
    """What `load_directory` did: `infos` of the adapters registered, and `(name, error)` of those refused."""

    infos: list[AdapterInfo]
    errors: list[tuple[str, AdapterError]]


class AdapterStore:
    """The host tier of adapters. Every method may be called from any thread.

    `dtype` is the pool's (float32 or bfloat16). `host_bytes` bounds the tiles in memory; beyond it the least recently
    used are spilled to a private directory under `spill_dir` (None: the system's temporary directory). Adapters beyond
    `max_rank` (of a projection) or `max_pages` (of the pool) are refused.
    """

    def __init__(
        self,
        geometry: BaseGeometry,
        dtype: str | np.dtype,
        host_bytes: int,
        spill_dir: str | Path | None = None,
        *,
        max_rank: int = MAX_RANK,
        max_pages: int | None = None,
    ) -> None:
        self.base_names: frozenset[str] = frozenset()
        """Lower-case names of the base model; empty: unknown, so that no adapter is warned about."""
        self.geometry = geometry
        self._max_rank = max_rank
        self._max_pages = max_pages
        self.dtype = tile_dtype(dtype)
        self._cache = HostCache(
            host_bytes,
            None if spill_dir is None else Path(spill_dir),
            lambda directory: pack_tiles(read_peft(directory, geometry), geometry, self.dtype),
        )
        self._lock = threading.Lock()
        self._infos: dict[str, AdapterInfo] = {}
        self._prepared: set[PreparedAdapter] = set()

    def register(self, name: str, directory: str | Path) -> AdapterInfo:
        """Reads a PEFT directory and points `name` to its content; a name that exists is moved to the new content.

        Raises AdapterError when the adapter cannot be used or is larger than allowed; nothing is changed then.
        """
        return self.publish(self.prepare(name, directory))

    def add(self, name: str, adapter: LoraAdapter) -> AdapterInfo:
        """Like `register`, for an adapter in memory."""
        return self.publish(self.prepare(name, adapter))

    def prepare(self, name: str, adapter: str | Path | LoraAdapter) -> PreparedAdapter:
        """All of `register` (or `add`) that takes time: reads, checks and packs the adapter, and spills others to make
        room for it. The result is to be published or discarded; until then it keeps the content alive.

        Raises AdapterError like `register`.
        """
        if isinstance(adapter, LoraAdapter):
            return self._prepare(name, adapter, None)
        read = read_peft(adapter, self.geometry, partial(self._check_size, name))
        return self._prepare(name, read, Path(adapter))

    def publish(self, prepared: PreparedAdapter) -> AdapterInfo:
        """Points the name to what was prepared for it. Never waits for the disk.

        Raises AdapterError if it was published or discarded before.
        """
        info = prepared.info
        with self._lock:
            self._take(prepared)
            self._cache.name(info.digest, prepared.source)
            replaced = self._infos.get(info.name)
            self._infos[info.name] = info
        if replaced is not None:
            self._cache.release(replaced.digest)
        return info

    def discard(self, prepared: PreparedAdapter) -> None:
        """Lets go of what was prepared and will not be published. Raises AdapterError like `publish`."""
        with self._lock:
            self._take(prepared)
        self._cache.unpin(prepared.info.digest)

    def load_directory(self, root: str | Path, progress: bool = True, threads: int = 2) -> LoadReport:
        """Registers every adapter directory in `root` under its folder's name; `threads` of them at a time.

        A bad adapter, or one that lies a level too high or too low, is reported and disturbs no other. Raises
        AdapterError only when `root` is not a directory.
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
        """Drops a name, and its content unless another name or a pin holds it. Raises AdapterError if unknown."""
        with self._lock:
            info = self._info(name)
            del self._infos[name]
        self._cache.release(info.digest)

    def resolve(self, name: str) -> str:
        """The digest of a name. Raises AdapterError naming the nearest names."""
        with self._lock:
            return self._info(name).digest

    def has(self, name: str) -> bool:
        """Whether a name is registered."""
        with self._lock:
            return name in self._infos

    def is_named(self, digest: str) -> bool:
        """Whether any name points to this content."""
        return self._cache.is_named(digest)

    def holds(self, digest: str) -> bool:
        """Whether this content is in memory or on disk, for a name or a pin."""
        return self._cache.holds(digest)

    def info(self, name: str) -> AdapterInfo:
        """What `register` returned for a name. Raises AdapterError naming the nearest names."""
        with self._lock:
            return self._info(name)

    def infos(self) -> list[AdapterInfo]:
        """All registered adapters, in order of registration."""
        with self._lock:
            return list(self._infos.values())

    def tier(self, digest: str) -> Tier:
        """Whether content is in memory ("host") or must be read back before it is used ("disk"). Raises AdapterError
        if the digest is unknown."""
        return self._cache.tier(digest)

    def tiers(self) -> dict[str, Tier]:
        """`tier` of all content, by digest, as of one moment."""
        return self._cache.tiers()

    def get(self, digest: str) -> AdapterTiles | None:
        """The tiles if they are in memory, None if they are on disk. Never waits for the disk.

        Raises AdapterError if the digest is unknown or its spill file was lost.
        """
        return self._cache.get(digest)

    def request(self, digest: str) -> AdapterTiles | None:
        """Like `get`; when the answer is None, the tiles are on their way back to memory."""
        return self._cache.request(digest)

    def prefetch(self, digest: str) -> None:
        """Starts bringing a spilled adapter back and returns at once; a failure is kept for `get` and `wait`.

        Raises AdapterError if the digest is unknown.
        """
        self._cache.prefetch(digest)

    def wait(self, digest: str, timeout: float | None = None) -> AdapterTiles:
        """The tiles, read back first if need be; blocks up to `timeout` seconds.

        Raises AdapterError if the digest is unknown, was dropped or lost meanwhile, or time ran out.
        """
        return self._cache.wait(digest, timeout)

    def pin(self, digest: str) -> None:
        """Keeps content alive (in memory or on disk) whatever happens to its names, until `unpin`. Pins are counted."""
        self._cache.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undoes one `pin`; content that no name points to is dropped with its last pin."""
        self._cache.unpin(digest)

    def observe_disk(self, observer: DiskObserver | None) -> None:
        """Has `observer` told of every disk access from now on, by the thread that does it; None: nobody."""
        self._cache.on_disk = observer

    def stats(self) -> StoreStats:
        """The counters."""
        cache = self._cache
        return StoreStats(
            registered=len(self._infos),
            resident_bytes=cache.resident_bytes,
            spilled=cache.num_spilled,
            spill_writes=cache.spill_writes,
            spill_reads=cache.spill_reads,
        )

    def close(self) -> None:
        """Drops everything, ends the worker thread and removes the spill files. May be called twice."""
        with self._lock:
            self._infos.clear()
            self._prepared.clear()
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, name: str, adapter: LoraAdapter, source: Path | None) -> PreparedAdapter:
        adapter.check(self.geometry)
        self._check_base(name, adapter.config.base_model_name_or_path)
        num_pages, nbytes = self._check_size(name, adapter.ranks)
        ranks = tuple(int(rank) for rank in adapter.ranks.max(axis=0))
        info = AdapterInfo(name, adapter.digest, max(ranks), ranks, num_pages, nbytes)
        if not self._cache.hold(info.digest):
            self._cache.insert(pack_tiles(adapter, self.geometry, self.dtype), source)
        prepared = PreparedAdapter(info, source)
        with self._lock:
            self._prepared.add(prepared)
        try:
            self._cache.keep_budget(info.digest)
        except BaseException:  # Ctrl-C
            self.discard(prepared)
            raise
        return prepared

    def _take(self, prepared: PreparedAdapter) -> None:
        if prepared not in self._prepared:
            raise AdapterError(f"adapter {prepared.info.name!r} was published or discarded before; prepare it again")
        self._prepared.remove(prepared)

    def _check_size(self, name: str, ranks: np.ndarray) -> tuple[int, int]:
        """Pages and bytes of an adapter with these ranks `[num_layers, 7]`; raises AdapterError if it is too large."""
        shape, rank = tile_shape(ranks, self.geometry), int(ranks.max())
        num_pages, nbytes = shape[1], int(np.prod(shape)) * self.dtype.itemsize
        if rank > self._max_rank:
            raise AdapterError(
                f"adapter {name!r} has rank {rank} but max_rank is {self._max_rank}; raise it (at most {MAX_RANK})"
            )
        if self._max_pages is not None and num_pages > self._max_pages:
            raise AdapterError(
                f"adapter {name!r} needs {num_pages} pages but the pool has {self._max_pages} for adapters; raise "
                "num_pages (or adapter_pages, if it is set)"
            )
        if nbytes > self._cache.host_bytes:
            raise AdapterError(
                f"adapter {name!r} needs {nbytes} bytes but host_adapter_bytes is {self._cache.host_bytes}; "
                f"raise it to at least {nbytes}"
            )
        return num_pages, nbytes

    def _check_base(self, name: str, trained_on: str | None) -> None:
        """Warns if an adapter's config names another base model than this one."""
        *_, last = re.split(r"[/\\]", (trained_on or "").rstrip("/\\").lower())
        if last and self.base_names and last not in self.base_names:
            warnings.warn(
                f"adapter {name!r}: base_model_name_or_path={quoted(trained_on)} is another name than that of the base "
                f"model, {' or '.join(sorted(self.base_names))}; if it was trained on another model, its answers are "
                "wrong",
                stacklevel=2,
            )

    def _register_or_error(self, directory: Path) -> AdapterInfo | AdapterError:
        try:
            return self.register(directory.name, directory)
        except AdapterError as error:
            return error
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            return AdapterError(f"{directory}: {error}")

    def _info(self, name: str) -> AdapterInfo:
        info = self._infos.get(name)
        if info is None:
            near = difflib.get_close_matches(name, _neighbours(name, list(self._infos)), n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else f"; {len(self._infos)} are registered"
            raise UnknownAdapterError(f"unknown adapter {name!r}{hint}")
        return info


def _neighbours(name: str, names: list[str]) -> list[str]:
    """The names to compare a misspelt one with: all, or of very many those next to it in the alphabet, since comparing
    with 10,000 would hold up every other request by 0.1 s."""
    if len(names) <= 200:
        return names
    names.sort()
    at = bisect(names, name)
    return names[max(0, at - 100) : at + 100]
