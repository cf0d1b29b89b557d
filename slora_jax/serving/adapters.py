"""Registers adapters with the engine: those of a watched directory, and those that clients load and unload."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from tqdm import tqdm

from slora_jax.adapters import AdapterInfo
from slora_jax.adapters.peft_format import misplaced
from slora_jax.adapters.store import PreparedAdapter
from slora_jax.engine import Engine
from slora_jax.errors import AdapterError
from slora_jax.phases import advance, phase
from slora_jax.serving.adapter_files import AdapterRoots, StateFile, Version, adapters_in, version_of
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.http.answers import Unloaded
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.settings import ServerSettings

logger = logging.getLogger("slora_jax.serving")

STATE_FILE = ".slora-adapters.json"
POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.5
"""First and longest interval of polling for an unloaded adapter's memory; it doubles, since hundreds may wait."""


@dataclass(frozen=True)
class Wanted:
    """An adapter that should be registered."""

    directory: Path
    version: Version


class Adapters:
    """Registers and unregisters adapters with an engine. Runs in the event loop, except for `register_all`."""

    def __init__(self, settings: ServerSettings, on_gone: Callable[[str], None]) -> None:
        """Reads nothing yet.

        Args:
          on_gone: called with the name of each adapter that was unregistered.
        """
        self._settings, self._on_gone = settings, on_gone
        self._roots = AdapterRoots(settings.roots)
        self._file = StateFile(settings.state_file or (settings.adapters and settings.adapters / STATE_FILE))
        self._registered: dict[str, Wanted] = {}
        self._seen: dict[str, Wanted] = {}  # by the last scan; what changes between two scans may be incomplete
        self._known: set[str] = set()  # names registered when the last scan began
        self._scan_seconds = 0.0  # CPU time of the last scan, without loads and unloads
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by name
        self._readers = asyncio.Semaphore(settings.limits.adapter_loads)
        self._refused: dict[str, str] = {}  # by name: why an adapter cannot be used
        self._left_out: dict[str, str] = {}  # by name: why a folder of the watched directory is not registered

    @property
    def refused(self) -> dict[str, str]:
        """Reasons why adapters are missing, by name."""
        return self._left_out | self._refused

    def register_all(self, engine: Engine) -> None:
        """Registers all adapters at the start, on the engine's thread. A bad adapter is logged and left out."""
        wanted = self._seen = self._wanted()
        with phase("adapters"), ThreadPoolExecutor(self._settings.limits.adapter_loads) as pool:
            read = pool.map(lambda item: self._read_or_reason(engine, *item), wanted.items())
            bar = tqdm(
                zip(wanted.items(), read, strict=True),
                total=len(wanted),
                desc="loading adapters",
                unit="adapter",
                disable=not engine.config.progress,
            )
            for done, ((name, one), prepared) in enumerate(bar):
                advance(done, len(wanted))
                self._registered[name] = one
                if isinstance(prepared, str):
                    self._refuse(name, prepared)
                else:
                    engine.publish_adapter(prepared)

    async def load(self, loop: EngineLoop, name: str, path: str, in_place: bool) -> AdapterInfo:
        """Registers the adapter at `path` under `name`, now and at the next start.

        Raises:
          ApiError: the path is not allowed, or the name is taken and not `in_place`.
          AdapterError: the adapter cannot be used. Nothing was changed.
        """
        if name == self._settings.base_name:
            raise ApiError(400, f"lora_name={name!r} is the base model's name", code="name_taken", param="lora_name")
        if not name.isprintable():
            message = f"lora_name={name!r} has characters that do not print"
            raise ApiError(400, message, code="invalid_value", param="lora_name")
        async with self._alone(name):
            if loop.engine.store.has(name) and not in_place:
                message = f"adapter {name!r} is loaded already; load_inplace=true replaces it"
                raise ApiError(400, message, code="name_taken", param="lora_name")
            directory = await asyncio.to_thread(self._roots.find, path)
            info = await self._register(loop, name, Wanted(directory, version_of(directory)))
            is_watched = self._settings.adapters is not None and directory == self._settings.adapters.resolve() / name
            await asyncio.to_thread(self._file.loaded, name, None if is_watched else directory)
            return info

    async def unload(self, loop: EngineLoop, name: str, drain_seconds: float) -> Unloaded:
        """Unregisters a name at once, then waits until requests that use it have ended and its memory is free.

        Raises:
          UnknownAdapterError: no adapter has this name.
        """
        start = time.monotonic()
        async with self._alone(name):
            store = loop.engine.store
            info = store.info(name)
            pages = await loop.call(lambda engine: _pages_held(engine, info.digest))
            is_gone = await loop.call(lambda engine: engine.unload_adapter(name))
            self._forget(name)
            root = self._settings.adapters
            version = version_of(root / name) if root is not None and os.path.isdir(root / name) else None
            await asyncio.to_thread(self._file.unloaded, name, version)
        shared, poll = store.is_named(info.digest), POLL_SECONDS
        while not is_gone and not shared and time.monotonic() - start < drain_seconds:
            await asyncio.sleep(poll)
            poll = min(2 * poll, MAX_POLL_SECONDS)
            held = await loop.call(lambda engine: _pages_held(engine, info.digest))
            is_gone = not held and not store.holds(info.digest)
        freed = is_gone and not shared
        if shared:
            what = "Its content stays: another name has the same."
        elif not freed:
            what = "Requests under way still use it; its memory is free when they have ended."
        else:
            what = "Its memory is free."
        return {
            "message": f"Success: LoRA adapter '{name}' removed successfully. {what}",
            "name": name,
            "freed": freed,
            "freed_pages": pages * freed,
            "freed_bytes": info.nbytes * freed,
            "drain_seconds": round(time.monotonic() - start, 3),
        }

    async def watch(self, loop: EngineLoop) -> None:
        """Follows the watched directory and the state file until it is cancelled. With very many adapters it scans less
        often, so that scans take at most 2 % of the time."""
        while True:
            await asyncio.sleep(max(self._settings.watch_seconds, 50 * self._scan_seconds))
            try:
                await self.scan(loop)
            except ApiError:
                pass  # the engine is not available now
            except Exception as error:  # noqa: BLE001  the next scan may succeed
                logger.warning("scanning for adapters failed: %r", error)

    async def scan(self, loop: EngineLoop) -> None:
        """Registers adapters that are new or changed, once they are unchanged between two scans; unregisters removed
        ones."""
        before, known_before = self._seen, self._known
        self._known, registered = set(self._registered), dict(self._registered)

        def compare() -> tuple[dict[str, Wanted], list[str]]:
            start = time.thread_time()  # leaves out time spent waiting for other threads
            seen = self._wanted()
            self._scan_seconds = time.thread_time() - start
            new = [name for name, one in seen.items() if before.get(name) == one != registered.get(name)]
            # An adapter that a client has just loaded may be registered and not yet in the state file.
            removed = [name for name in self._known & known_before if name not in seen and name not in before]
            return seen, new + removed

        self._seen, changed = await asyncio.to_thread(compare)
        await asyncio.gather(*(self._follow(loop, name) for name in changed))

    async def _follow(self, loop: EngineLoop, name: str) -> None:
        async with self._alone(name):
            one = self._seen.get(name)
            if one is None:
                self._forget(name)
                if loop.engine.store.has(name):
                    await loop.call(lambda engine: engine.unload_adapter(name))
                    logger.info("adapter %r is gone", name)
            elif one != self._registered.get(name):
                if (await asyncio.to_thread(self._file.read)).has_unloaded(name, one.version):
                    return  # after the scan
                try:
                    await self._register(loop, name, one)
                    logger.info("adapter %r registered", name)
                except AdapterError as error:
                    self._registered[name] = one  # until it changes
                    self._refuse(name, str(error))

    async def _register(self, loop: EngineLoop, name: str, one: Wanted) -> AdapterInfo:
        async with self._readers:
            prepared = await asyncio.to_thread(self._read, loop.engine, name, one)
        try:
            info = await loop.call(lambda engine: engine.publish_adapter(prepared))
        except ApiError:
            loop.engine.discard_adapter(prepared)
            raise
        self._registered[name] = one
        self._refused.pop(name, None)
        return info

    def _read(self, engine: Engine, name: str, one: Wanted) -> PreparedAdapter:
        self._roots.check(one.directory)
        prepared = engine.prepare_adapter(name, one.directory)
        try:
            self._roots.check(one.directory)  # no link changed during the read
        except AdapterError:
            engine.discard_adapter(prepared)
            raise
        return prepared

    def _read_or_reason(self, engine: Engine, name: str, one: Wanted) -> PreparedAdapter | str:
        try:
            return self._read(engine, name, one)
        except AdapterError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  one bad adapter must not stop the others
            return repr(error)

    def _wanted(self) -> dict[str, Wanted]:
        """Returns the adapters to register: those of the watched directory, with clients' changes. Logs the folders
        that are left out. Reads from disk."""
        changes = self._file.read()
        root = self._settings.adapters
        wanted: dict[str, Wanted] = {}
        left_out = {} if root is None else misplaced(root)
        for name, version in adapters_in(root).items() if root is not None else ():
            if name in changes.loaded:
                left_out[name] = f"a client loaded {changes.loaded[name]} under this name"
            elif name == self._settings.base_name:
                left_out[name] = "it has the base model's name; rename the folder, or the base model (name)"
            elif not name.isprintable():
                left_out[ascii(name)] = "its name has characters that do not print; rename the folder"
            elif changes.has_unloaded(name, version):
                left_out[name] = "a client unloaded it; load it again, or replace its files"
            else:
                wanted[name] = Wanted(root / name, version)  # type: ignore[operator]
        for name, directory in changes.loaded.items():
            wanted[name] = Wanted(Path(directory), version_of(Path(directory)))
        for name, reason in left_out.items():
            if self._left_out.get(name) != reason:
                logger.warning("adapter %r is left out: %s", name, reason)
        self._left_out = left_out
        return wanted

    def _refuse(self, name: str, reason: str) -> None:
        self._refused[name] = reason
        logger.warning("adapter %r is left out: %s", name, reason)

    def _alone(self, name: str) -> asyncio.Lock:
        """Returns the lock that serializes changes of one name."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _forget(self, name: str) -> None:
        self._registered.pop(name, None)
        self._refused.pop(name, None)
        self._on_gone(name)


def _pages_held(engine: Engine, digest: str) -> int:
    resident = engine.residency.find(digest)
    return 0 if resident is None else len(resident.pages)
