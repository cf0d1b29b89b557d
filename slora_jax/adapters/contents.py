"""Adapter contents by digest: reference counts, a byte budget in host memory, LRU spill to disk, read-back."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slora_jax.adapters.spill import SpillDamagedError, SpilledTiles, SpillFiles
from slora_jax.adapters.tiles import AdapterTiles
from slora_jax.errors import AdapterError

logger = logging.getLogger(__name__)

DiskObserver = Callable[[str, str, int, float], None]
"""Called after each disk access, on the accessing thread, with "read" or "write", digest, bytes, and start in seconds
of `time.perf_counter`."""

Tier = Literal["host", "disk"]
"""Place of content: in memory (perhaps also on disk), or on disk only."""


@dataclass(eq=False)
class _Content:
    """Tiles of one digest: in memory (`tiles`), on disk (`spilled`), both, or lost (`error`).

    Attributes:
      names: names that point to it; these and `pins` keep it alive.
      pins: running requests and prepared adapters that use it.
      waiters: callers blocked in `wait`.
    """

    digest: str
    nbytes: int
    source: Path | None
    tiles: AdapterTiles | None = None
    spilled: SpilledTiles | None = None
    error: AdapterError | None = None
    names: int = 0
    pins: int = 0
    waiters: int = 0
    loading: bool = False
    spilling: bool = False


class AdapterContents:
    """Keeps at most `host_adapter_bytes` of tiles in memory, the rest in spill files. Every method is thread-safe.

    One lock guards all state and is never held during disk I/O. The least recently used content is spilled first,
    pinned content last. The budget may be exceeded while content is inserted, while callers block in `wait`, and when a
    spill fails.

    Content that could not be read back raises the same error until it is inserted again; if a source or an undamaged
    spill file remains, the next `acquire` also clears the error.
    """

    def __init__(
        self, host_adapter_bytes: int, spill_dir: str | Path | None, reread: Callable[[Path], AdapterTiles]
    ) -> None:
        """Makes an empty collection; `reread` packs an adapter again from its source directory."""
        self.host_adapter_bytes = host_adapter_bytes
        self._reread = reread
        self._files = SpillFiles(None if spill_dir is None else Path(spill_dir))
        self._observer: DiskObserver | None = None
        self._changed = threading.Condition(threading.Lock())
        self._contents: dict[str, _Content] = {}
        self._resident: OrderedDict[str, _Content] = OrderedDict()  # least recently used first
        self._resident_bytes = self._spilling_bytes = 0
        self._spill_writes = self._spill_reads = 0
        self._queue: deque[_Content] = deque()  # to be read back
        self._dropped: deque[tuple[AdapterTiles | None, SpilledTiles | None]] = deque()
        self._worker: threading.Thread | None = None
        self._spill_failing = False
        self._closed = False

    def is_named(self, digest: str) -> bool:
        """Returns whether any name points to this content."""
        with self._changed:
            content = self._contents.get(digest)
            return content is not None and content.names > 0

    def holds(self, digest: str) -> bool:
        """Returns whether this content is in memory or on disk."""
        with self._changed:
            return digest in self._contents

    def tiers(self) -> dict[str, Tier]:
        """A consistent snapshot of every content's tier, by digest."""
        with self._changed:
            tiers: dict[str, Tier] = dict.fromkeys(self._contents, "disk")
            tiers.update(dict.fromkeys(self._resident, "host"))
            return tiers

    def acquire(self, digest: str) -> None:
        """Pins content, in memory or on disk, until the matching `release`, even if all its names are removed.

        Raises AdapterError if the digest is unknown.
        """
        with self._changed:
            content = self._content(digest)
            content.pins += 1
            if content.spilled is not None or content.source is not None:
                content.error = None

    def release(self, digest: str) -> None:
        """Undoes one `acquire`. Raises AdapterError if the digest is unknown or not acquired."""
        with self._changed:
            if not self._content(digest).pins:
                raise AdapterError(f"adapter {digest[:12]} is not acquired, so it cannot be released")
            self._count(digest, pins=-1)

    def request(self, digest: str) -> AdapterTiles | None:
        """Returns the tiles if they are in memory; otherwise starts reading them from disk and returns None at once.

        Raises AdapterError if the digest is unknown or its content was lost.
        """
        with self._changed:
            return self._touch(self._content(digest))

    def wait(self, digest: str, timeout: float | None = None) -> AdapterTiles:
        """Returns the tiles, read from disk if needed; blocks up to `timeout` seconds (None: without limit).

        Raises AdapterError on timeout, if the digest is unknown, or if its content is lost or removed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            content = self._content(digest)
            content.waiters += 1
            try:
                while (tiles := self._touch(content)) is None:
                    remaining = None if deadline is None else deadline - time.monotonic()
                    if remaining is not None and remaining <= 0:
                        raise AdapterError(f"adapter {digest[:12]} was not read back within {timeout} s")
                    self._changed.wait(remaining)
                    if self._contents.get(digest) is not content:
                        raise AdapterError(f"adapter {digest[:12]} was removed while it was awaited")
                return tiles
            finally:
                content.waiters -= 1

    def observe_disk(self, observer: DiskObserver | None) -> None:
        """Calls `observer` after every later disk access; None removes the observer."""
        self._observer = observer

    def close(self) -> None:
        """Drops all content, ends the worker and removes the spill files. May be called twice."""
        with self._changed:
            self._closed = True
            for collection in (self._contents, self._resident, self._queue, self._dropped):
                collection.clear()
            self._resident_bytes = 0
            worker = self._worker
            self._changed.notify_all()
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        self._files.close()

    # With the lock held -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise AdapterError("the adapter store is closed")

    def _content(self, digest: str) -> _Content:
        self._check_open()
        content = self._contents.get(digest)
        if content is None:
            raise AdapterError(f"no adapter with digest {digest!r} is registered")
        return content

    def _insert(self, tiles: AdapterTiles, source: Path | None) -> None:
        """Makes content resident, also if it was spilled or lost; adds no reference."""
        self._check_open()
        content = self._contents.setdefault(tiles.digest, _Content(tiles.digest, tiles.nbytes, source))
        content.source = content.source or source
        self._make_resident(content, tiles)

    def _count(self, digest: str, *, names: int = 0, pins: int = 0) -> None:
        """Adds to the reference counts and drops content that has no reference left."""
        content = self._content(digest)
        content.names += names
        content.pins += pins
        if not content.names and not content.pins:
            self._drop(content)

    def _touch(self, content: _Content) -> AdapterTiles | None:
        """Returns the tiles and marks them most recently used; or queues their read and returns None."""
        if content.error is not None:
            raise AdapterError(*content.error.args)
        if content.tiles is not None:
            self._resident.move_to_end(content.digest)
        elif not content.loading:
            content.loading = True
            self._queue.append(content)
            self._wake_worker()
        return content.tiles

    def _make_resident(self, content: _Content, tiles: AdapterTiles) -> None:
        content.error = None
        if content.tiles is None:
            content.tiles = tiles
            self._resident[content.digest] = content
            self._resident_bytes += content.nbytes
        self._changed.notify_all()

    def _leave_memory(self, content: _Content) -> None:
        if content.tiles is not None and self._resident.pop(content.digest, None) is not None:
            self._resident_bytes -= content.nbytes
        content.tiles = None

    def _drop(self, content: _Content) -> None:
        """Forgets content. The worker frees its memory and its file, since both may take milliseconds."""
        del self._contents[content.digest]
        self._dropped.append((content.tiles, content.spilled))
        self._leave_memory(content)
        self._wake_worker()

    def _wake_worker(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="slora-adapters", daemon=True)
            self._worker.start()
        self._changed.notify_all()

    def _victim(self, keep: _Content | None) -> _Content | None:
        """The content to spill next; None within the budget, or if no content can be spilled."""
        if self._resident_bytes - self._spilling_bytes <= self.host_adapter_bytes:
            return None
        pinned = None
        for content in self._resident.values():
            if content is keep or content.spilling or content.waiters:
                continue
            if not content.pins:
                return content
            pinned = pinned or content
        return pinned

    # Disk I/O, without the lock ---------------------------------------------------------------------------------------

    def _enforce_budget(self, keep: str) -> None:
        """Spills content, except the just inserted one of digest `keep`, until the budget holds."""
        while True:
            with self._changed:
                victim = self._victim(self._contents.get(keep))
                if victim is None or victim.tiles is None:
                    return
                tiles, written = victim.tiles, victim.spilled
                victim.spilling = True
                self._spilling_bytes += victim.nbytes
            spilled = error = None
            try:
                spilled = written if written and self._files.is_there(written) else self._write(tiles)
            except Exception as failure:  # noqa: BLE001  the adapter is still in memory
                error = failure
            finally:
                with self._changed:
                    victim.spilling = False
                    self._spilling_bytes -= victim.nbytes
                    alive = self._contents.get(victim.digest) is victim
                    moved = spilled is not None and alive and victim.spilled is written
                    if moved:
                        self._spill_writes += spilled is not written
                        victim.spilled = spilled
                        self._leave_memory(victim)
            del tiles
            if error is not None:
                self._warn_spill_failed(victim, error)
                return
            self._spill_failing = False
            if not moved:
                self._files.discard(spilled)

    def _warn_spill_failed(self, content: _Content, error: Exception) -> None:
        """Warns once, and again only after a spill has succeeded."""
        if not self._spill_failing:
            logger.warning(
                "host_adapter_bytes=%d is exceeded: an adapter of %d bytes stays in memory because it cannot be "
                "spilled: %s; make room in spill_dir, or raise host_adapter_bytes",
                self.host_adapter_bytes, content.nbytes, _text(error),
            )  # fmt: skip
        self._spill_failing = True

    def _work(self) -> None:
        """Runs the worker thread: frees dropped content and reads queued content until the store is closed."""
        while True:
            with self._changed:
                while not (self._dropped or self._queue or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                dropped, self._dropped = self._dropped, deque()
                content = self._queue.popleft() if self._queue else None
            while dropped:
                self._files.discard(dropped.pop()[1])
            if content is not None:
                self._load(content)
            del content

    def _load(self, content: _Content) -> None:
        """Reads queued content and records the result, unless the content was dropped."""
        with self._changed:
            if self._contents.get(content.digest) is not content:
                return
        try:
            result = content.tiles or self._read_back(content)
        except BaseException as error:  # noqa: BLE001  one adapter must not end the worker
            result = _lost(content, [_text(error)])
        with self._changed:
            content.loading = False
            if self._contents.get(content.digest) is content:
                if isinstance(result, AdapterTiles):
                    self._make_resident(content, result)
                elif content.tiles is None:
                    content.error = result
            self._changed.notify_all()
        del result
        self._enforce_budget(keep=content.digest)

    def _read_back(self, content: _Content) -> AdapterTiles | AdapterError:
        """Reads the spill file or, if that fails, the source directory if it still has the same weights."""
        digest, reasons = content.digest, []
        if content.spilled is None:
            reasons.append("its spill file was found lost before")
        else:
            try:
                start = time.perf_counter()
                tiles = self._files.read(content.spilled)
                self._spill_reads += 1
                self._observed("read", tiles, start)
                return tiles
            except Exception as error:  # noqa: BLE001  one adapter must not end the worker
                reasons.append(_text(error))
                if isinstance(error, SpillDamagedError):
                    self._forget_file(content)
        if self._contents.get(digest) is not content:
            return AdapterError(f"content {digest[:12]} was removed while it was read")
        if content.source is None:
            return _lost(content, [*reasons, "it was loaded from memory, so there is no directory to read it from"])
        try:
            tiles = self._reread(content.source)
        except Exception as error:  # noqa: BLE001
            return _lost(content, [*reasons, f"nor can its source be read: {_text(error)}"])
        if tiles.digest != digest:
            changed = f"its source {content.source} now has other weights (digest {tiles.digest[:12]})"
            return _lost(content, [*reasons, changed])
        self._forget_file(content)
        logger.warning("content %s: %s; its source %s was read again", digest[:12], "; ".join(reasons), content.source)
        return tiles

    def _forget_file(self, content: _Content) -> None:
        with self._changed:
            spilled, content.spilled = content.spilled, None
        self._files.discard(spilled)

    def _write(self, tiles: AdapterTiles) -> SpilledTiles:
        start = time.perf_counter()
        spilled = self._files.write(tiles)
        self._observed("write", tiles, start)
        return spilled

    def _observed(self, access: str, tiles: AdapterTiles, start: float) -> None:
        observer = self._observer
        if observer is not None:
            observer(access, tiles.digest, tiles.nbytes, start)


def _lost(content: _Content, reasons: list[str]) -> AdapterError:
    return AdapterError(f"content {content.digest[:12]} was lost: {'; '.join(reasons)}; load the adapter again")


def _text(error: BaseException) -> str:
    """The message of an AdapterError or OSError; the `repr` of any other error."""
    return str(error) if isinstance(error, (AdapterError, OSError)) else repr(error)
