"""Tiles in host memory by digest: reference counts, a byte budget, LRU spill to disk, read-back by a worker thread."""

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
"""Told of each disk access at its end, on the thread that did it: "read" or "write", digest, bytes, and when it began
in seconds of `time.perf_counter`."""

Tier = Literal["host", "disk"]
"""Where content is: in memory (and perhaps also on disk), or not, to be read back before it is used."""


@dataclass(eq=False)
class _Content:
    """One digest's tiles and who needs them: in memory (`tiles`), on disk (`spilled`), both, or lost (`error`).

    `names` point to it, running requests and registrations under way `pins` it, callers (`waiters`) block on it;
    without names and pins it goes.
    """

    digest: str
    nbytes: int
    source: Path | None
    tiles: AdapterTiles | None
    spilled: SpilledTiles | None = None
    error: AdapterError | None = None
    names: int = 0
    pins: int = 0
    waiters: int = 0
    loading: bool = False
    spilling: bool = False


class HostCache:
    """At most `host_bytes` of tiles in memory, the rest in spill files. Every method may be called from any thread.

    One lock guards all state and is never held during disk I/O. The least recently used content is spilled first,
    content pinned by requests only when there is no other. The budget is exceeded while content arrives, while callers
    block in `wait`, and when the disk refuses a spill. `reread(directory)` packs an adapter anew from its source.

    Content that cannot be read back keeps the error until it is inserted again, or until the next `pin` if anything is
    left that may be readable by then: its source, or a spill file that is not known to be damaged.
    """

    def __init__(self, host_bytes: int, spill_dir: Path | None, reread: Callable[[Path], AdapterTiles]) -> None:
        self.host_bytes = host_bytes
        self.spill_writes = self.spill_reads = 0
        self.on_disk: DiskObserver | None = None
        self._reread = reread
        self._files = SpillFiles(spill_dir)
        self._changed = threading.Condition(threading.Lock())
        self._contents: dict[str, _Content] = {}
        self._resident: OrderedDict[str, _Content] = OrderedDict()  # least recently used first
        self._resident_bytes = self._spilling_bytes = 0
        self._queue: deque[_Content] = deque()  # to be read back
        self._dropped: deque[tuple[AdapterTiles | None, SpilledTiles | None]] = deque()
        self._worker: threading.Thread | None = None
        self._disk_refuses = False
        self._closed = False

    @property
    def resident_bytes(self) -> int:
        """Bytes of tiles in memory."""
        return self._resident_bytes

    @property
    def num_spilled(self) -> int:
        """Contents that are not in memory."""
        with self._changed:
            return len(self._contents) - len(self._resident)

    def hold(self, digest: str) -> bool:
        """Pins content that is in memory; False when it must be inserted."""
        with self._changed:
            self._check_open()
            content = self._contents.get(digest)
            if content is None or content.tiles is None:
                return False
            content.pins += 1
            return True

    def is_named(self, digest: str) -> bool:
        """Whether a name points to this content."""
        with self._changed:
            content = self._contents.get(digest)
            return content is not None and content.names > 0

    def holds(self, digest: str) -> bool:
        """Whether this content is in memory or on disk."""
        with self._changed:
            return digest in self._contents

    def tier(self, digest: str) -> Tier:
        """Where this content is; raises AdapterError for unknown content."""
        with self._changed:
            return "disk" if self._content(digest).tiles is None else "host"

    def tiers(self) -> dict[str, Tier]:
        """Where each content is, by digest."""
        with self._changed:
            tiers: dict[str, Tier] = dict.fromkeys(self._contents, "disk")
            tiers.update(dict.fromkeys(self._resident, "host"))
            return tiers

    def insert(self, tiles: AdapterTiles, source: Path | None) -> None:
        """Adds content with one pin (spilled or lost content is restored). `keep_budget` is the caller's next call."""
        with self._changed:
            self._check_open()
            content = self._contents.get(tiles.digest)
            if content is None:
                content = self._contents[tiles.digest] = _Content(tiles.digest, tiles.nbytes, source, None)
            content.pins += 1
            content.source = content.source or source
            self._make_resident(content, tiles)

    def name(self, digest: str, source: Path | None) -> None:
        """Turns one pin into a name. `source` is where the content can be read from again, from now on."""
        with self._changed:
            content = self._content(digest)
            content.names += 1
            content.pins -= 1
            content.source = source or content.source

    def keep_budget(self, digest: str) -> None:
        """Spills until the budget holds, but not `digest`, which has just arrived."""
        with self._changed:
            content = self._contents.get(digest)
        self._enforce_budget(keep=content)

    def release(self, digest: str) -> None:
        """Takes one name away; content without names and pins is dropped."""
        self._count_down(digest, "names")

    def pin(self, digest: str) -> None:
        """Keeps content alive (in memory or on disk) until `unpin`; pins are counted."""
        with self._changed:
            content = self._content(digest)
            content.pins += 1
            if content.spilled is not None or content.source is not None:
                content.error = None

    def unpin(self, digest: str) -> None:
        """Undoes one `pin`; content without names and pins is dropped."""
        self._count_down(digest, "pins")

    def get(self, digest: str) -> AdapterTiles | None:
        """The tiles if they are in memory; raises AdapterError for unknown or lost content."""
        with self._changed:
            return self._touch(self._content(digest))

    def request(self, digest: str) -> AdapterTiles | None:
        """Like `get`, and asks the worker to bring the tiles back when they are not in memory."""
        with self._changed:
            content = self._content(digest)
            tiles = self._touch(content)
            self._enqueue(content)
            return tiles

    def prefetch(self, digest: str) -> None:
        """Asks the worker to bring the tiles back when they are not in memory; raises only for unknown content."""
        with self._changed:
            self._enqueue(self._content(digest))

    def wait(self, digest: str, timeout: float | None) -> AdapterTiles:
        """Blocks until the tiles are in memory; raises AdapterError if they are lost, dropped, or `timeout` s pass."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            content = self._content(digest)
            content.waiters += 1
            try:
                while (tiles := self._touch(content)) is None:
                    self._enqueue(content)
                    remaining = None if deadline is None else deadline - time.monotonic()
                    if remaining is not None and remaining <= 0:
                        raise AdapterError(f"adapter {digest[:12]} was not read back within {timeout} s")
                    self._changed.wait(remaining)
                    if self._contents.get(digest) is not content:
                        raise AdapterError(f"adapter {digest[:12]} was removed while it was awaited")
                return tiles
            finally:
                content.waiters -= 1

    def close(self) -> None:
        """Drops everything, ends the worker and removes the spill files. May be called twice."""
        with self._changed:
            self._closed = True
            self._contents.clear()
            self._resident.clear()
            self._queue.clear()
            self._dropped.clear()
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

    def _touch(self, content: _Content) -> AdapterTiles | None:
        if content.error is not None:
            raise AdapterError(*content.error.args)
        if content.tiles is not None:
            self._resident.move_to_end(content.digest)
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

    def _enqueue(self, content: _Content) -> None:
        if content.tiles is not None or content.loading or content.error is not None:
            return
        content.loading = True
        self._queue.append(content)
        self._wake_worker()

    def _drop(self, content: _Content) -> None:
        """Forgets unused content at once. The worker frees its memory and its file: both may take milliseconds."""
        del self._contents[content.digest]
        self._dropped.append((content.tiles, content.spilled))
        self._leave_memory(content)
        self._wake_worker()

    def _wake_worker(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="slora-adapters", daemon=True)
            self._worker.start()
        self._changed.notify_all()

    def _count_down(self, digest: str, counter: str) -> None:
        with self._changed:
            content = self._content(digest)
            if getattr(content, counter) == 0:
                raise AdapterError(f"adapter {digest[:12]} has no {counter} left to take away")
            setattr(content, counter, getattr(content, counter) - 1)
            if not content.names and not content.pins:
                self._drop(content)

    def _victim(self, keep: _Content | None) -> _Content | None:
        if self._resident_bytes - self._spilling_bytes <= self.host_bytes:
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

    def _enforce_budget(self, keep: _Content | None) -> None:
        """Spills until the budget holds; `keep` has just arrived and stays."""
        while True:
            with self._changed:
                victim = self._victim(keep)
                if victim is None or victim.tiles is None:
                    return
                tiles, written = victim.tiles, victim.spilled
                victim.spilling = True
                self._spilling_bytes += victim.nbytes
            spilled = error = None
            try:
                spilled = written if written and self._files.is_there(written) else self._write(tiles)
            except Exception as refusal:  # noqa: BLE001  whatever the disk says, the adapter is in memory
                error = refusal
            finally:
                with self._changed:
                    victim.spilling = False
                    self._spilling_bytes -= victim.nbytes
                    alive = self._contents.get(victim.digest) is victim
                    left = spilled is not None and alive and victim.spilled is written
                    if left:
                        self.spill_writes += spilled is not written
                        victim.spilled = spilled
                        self._leave_memory(victim)
            del tiles
            if error is not None:
                self._spill_refused(victim, error)
                return
            self._disk_refuses = False
            if not left:
                self._files.discard(spilled)

    def _spill_refused(self, content: _Content, error: Exception) -> None:
        """Warns, once until spilling works again."""
        if not self._disk_refuses:
            logger.warning(
                "host_adapter_bytes=%d is exceeded: an adapter of %d bytes stays in memory because it cannot be "
                "spilled: %s; make room in spill_dir, or raise host_adapter_bytes",
                self.host_bytes, content.nbytes, _text(error),
            )  # fmt: skip
        self._disk_refuses = True

    def _work(self) -> None:
        """The worker: frees what was dropped and brings queued content back, one after another, until the cache is
        closed."""
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
                self._bring_back(content)
            del content

    def _bring_back(self, content: _Content) -> None:
        """Reads queued content, unless it was dropped meanwhile, and takes note of the result."""
        with self._changed:
            if self._contents.get(content.digest) is not content:
                return
        try:
            result = content.tiles or self._read_back(content)
        except BaseException as error:  # noqa: BLE001  one adapter must not end the worker
            result = AdapterError(f"content {content.digest[:12]} was lost: {_text(error)}; load the adapter again")
        with self._changed:
            content.loading = False
            if self._contents.get(content.digest) is content:
                if isinstance(result, AdapterTiles):
                    self._make_resident(content, result)
                elif content.tiles is None:
                    content.error = result
            self._changed.notify_all()
        del result
        self._enforce_budget(keep=content)

    def _read_back(self, content: _Content) -> AdapterTiles | AdapterError:
        """From the spill file; if that fails from the source, unless that has become another adapter."""
        digest, spilled, reasons = content.digest, content.spilled, []
        if spilled is None:
            reasons.append("its spill file was found lost before")
        else:
            try:
                start = time.perf_counter()
                tiles = self._files.read(spilled)
                self.spill_reads += 1
                self._observed("read", tiles, start)
                return tiles
            except Exception as error:  # noqa: BLE001  one adapter must not end the worker
                reasons.append(_text(error))
                if isinstance(error, SpillDamagedError):
                    self._forget_file(content)
        if self._contents.get(digest) is not content:
            return AdapterError(f"content {digest[:12]} was removed while it was read")
        if content.source is None:
            reasons.append("it was loaded from memory, so there is no directory to read it from")
        else:
            try:
                tiles = self._reread(content.source)
                if tiles.digest == digest:
                    self._forget_file(content)
                    logger.warning("content %s: %s; its source %s was read again",
                                   digest[:12], "; ".join(reasons), content.source)  # fmt: skip
                    return tiles
                reasons.append(f"its source {content.source} now has other weights (digest {tiles.digest[:12]})")
            except Exception as error:  # noqa: BLE001
                reasons.append(f"nor can its source be read: {_text(error)}")
        return AdapterError(f"content {digest[:12]} was lost: {'; '.join(reasons)}; load the adapter again")

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
        observer = self.on_disk
        if observer is not None:
            observer(access, tiles.digest, tiles.nbytes, start)


def _text(error: BaseException) -> str:
    """Of an error for the user: its message if we wrote it or the system did, else with its type."""
    return str(error) if isinstance(error, (AdapterError, OSError)) else repr(error)
