"""Spilled adapters: one raw file per adapter in a private directory, written atomically, verified when read back."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slora_jax.adapters.tiles import AdapterTiles
from slora_jax.errors import AdapterError, ConfigError


@dataclass(frozen=True, eq=False)
class SpilledTiles:
    """A spill file of an adapter's pages, with the metadata needed to read it back."""

    path: Path
    digest: str
    ranks: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    crc32: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class SpillDamagedError(AdapterError):
    """A spill file is missing or damaged; another read would fail too."""


class SpillFiles:
    """Writes and reads spill files in a fresh directory under `parent` (None: the system's temporary directory).

    The directory is created at the first write (at once if `parent` is given), created again if it disappears, and
    removed by `close` or at the end of the process. Thread-safe.
    """

    def __init__(self, parent: Path | None) -> None:
        """Raises ConfigError if no directory can be created under `parent`."""
        self._parent = parent
        self._lock = threading.Lock()
        self._directory: Path | None = None
        self._numbers = itertools.count()
        self._remove: weakref.finalize | None = None
        self._closed = False
        if parent is not None:
            try:
                self._ensure_directory()
            except OSError as error:
                raise ConfigError(
                    f"spill_dir={str(parent)!r}: must be a directory that can be written: {error}"
                ) from None

    def write(self, tiles: AdapterTiles) -> SpilledTiles:
        """Writes `tiles.pages` to a new file. Raises OSError (e.g. disk full) and leaves no partial file."""
        path = self._ensure_directory() / f"{tiles.digest[:16]}-{next(self._numbers)}.tiles"
        partial = path.with_suffix(".partial")
        content = tiles.pages.view(np.uint8).reshape(-1).data
        try:
            with partial.open("wb") as file:
                file.write(content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        pages = tiles.pages
        return SpilledTiles(path, tiles.digest, tiles.ranks, pages.shape, pages.dtype, zlib.crc32(content))

    def read(self, spilled: SpilledTiles) -> AdapterTiles:
        """Reads an adapter back. Raises SpillDamagedError if the file is missing or damaged, AdapterError if it cannot
        be read."""
        content = np.empty(spilled.nbytes, np.uint8)
        try:
            with spilled.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != spilled.nbytes or file.readinto(content.data) != size:
                    raise SpillDamagedError(
                        f"{spilled.path}: spill file is damaged: {size} bytes, not {spilled.nbytes}"
                    )
        except FileNotFoundError:
            raise SpillDamagedError(f"{spilled.path}: spill file is missing") from None
        except OSError as error:
            raise AdapterError(f"{spilled.path}: spill file cannot be read: {error}") from error
        if zlib.crc32(content.data) != spilled.crc32:
            raise SpillDamagedError(f"{spilled.path}: spill file is damaged: its checksum changed")
        return AdapterTiles(spilled.digest, spilled.ranks, content.view(spilled.dtype).reshape(spilled.shape))

    def is_there(self, spilled: SpilledTiles) -> bool:
        """Returns whether the file exists with the right size; only `read` checks its content."""
        try:
            return spilled.path.stat().st_size == spilled.nbytes
        except OSError:
            return False

    def discard(self, spilled: SpilledTiles | None) -> None:
        """Removes a spill file if possible; otherwise `close` removes it."""
        if spilled is not None:
            with contextlib.suppress(OSError):
                spilled.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the directory and all files in it."""
        with self._lock:
            self._closed = True
            if self._remove is not None:
                self._remove()

    def _ensure_directory(self) -> Path:
        with self._lock:
            if self._closed:
                raise OSError("the spill directory was removed with its store")
            if self._directory is None or not self._directory.is_dir():
                if self._parent is not None:
                    self._parent.mkdir(parents=True, exist_ok=True)
                self._directory = Path(tempfile.mkdtemp(prefix="slora-spill-", dir=self._parent))
                self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
            return self._directory
