"""Adapters as the service keeps them: what lies in a watched directory, what clients load and unload, and a file that
remembers the difference for the next start."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slora_jax.adapters import AdapterInfo
from slora_jax.adapters.store import PreparedAdapter
from slora_jax.engine import Engine
from slora_jax.errors import AdapterError
from slora_jax.serving.adapter_roots import AdapterRoots, Version, adapters_in, version_of
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.errors import ApiError
from slora_jax.serving.settings import ServerSettings

logger = logging.getLogger("slora_jax.serving")

STATE_FILE = ".slora-adapters.json"
POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.5
"""Between two looks at whether an unloaded adapter is free; each time twice as long, since hundreds may wait."""


@dataclass(frozen=True)
class Changes:
    """What clients changed: directories by name of those they loaded, and names of the watched directory that they
    unloaded."""

    loaded: dict[str, str]
    unloaded: frozenset[str]


@dataclass(frozen=True)
class Wanted:
    """An adapter that should be registered: where it lies, and what lies there."""

    directory: Path
    version: Version


@dataclass(frozen=True)
class Unloaded:
    """What an unload gave back. is_gone: whether all did, in time; shared: another name has the same content."""

    is_gone: bool
    shared: bool
    pages: int
    nbytes: int
    seconds: float


class Adapters:
    """Registers adapters with an engine and takes them away again. Used in the event loop, but for `register_all`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._roots = AdapterRoots(settings.roots)
        self._file = StateFile(settings.state_file or (settings.adapters and settings.adapters / STATE_FILE))
        self._registered: dict[str, Wanted] = {}
        self._seen: dict[str, Wanted] = {}  # at the last look; what changes while it is looked at is not complete
        self._one_at_a_time: dict[str, tuple[asyncio.Lock, int]] = {}  # and how many hold it or wait for it
        self._readers = asyncio.Semaphore(settings.limits.adapter_loads)
        self.refused: dict[str, str] = {}  # by name: why an adapter that should be there is not

    def register_all(self, engine: Engine) -> None:
        """At the start, on the engine's thread, with a progress bar. A bad one is logged and left out."""
        wanted = self._seen = self._wanted()
        with ThreadPoolExecutor(self._settings.limits.adapter_loads) as pool:
            read = pool.map(lambda item: self._read_or_reason(engine, *item), wanted.items())
            bar = tqdm(
                zip(wanted.items(), read, strict=True),
                total=len(wanted),
                desc="loading adapters",
                unit="adapter",
                disable=not engine.config.progress,
            )
            for (name, one), prepared in bar:
                self._registered[name] = one
                if isinstance(prepared, str):
                    self._refuse(name, prepared)
                else:
                    engine.publish_adapter(prepared)

    async def load(self, loop: EngineLoop, name: str, path: str, in_place: bool) -> AdapterInfo:
        """Registers the adapter at `path` under `name`, for good.

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
            info = await self._bring(loop, name, Wanted(directory, version_of(directory)))
            is_watched = self._settings.adapters is not None and directory == self._settings.adapters.resolve() / name
            await asyncio.to_thread(self._file.loaded, name, None if is_watched else directory)
            return info

    async def unload(self, loop: EngineLoop, name: str, drain_seconds: float) -> Unloaded:
        """Forgets a name at once; waits until the requests under way that use it have ended and its memory is free.

        Raises:
          UnknownAdapterError: no adapter has this name.
        """
        start = time.monotonic()
        async with self._alone(name):
            store = loop.engine.store
            info = store.info(name)
            pages = await loop.call(lambda engine: _pages_held(engine, info.digest))
            is_gone = await loop.call(lambda engine: engine.unload_adapter(name))
            self._registered.pop(name, None)
            self.refused.pop(name, None)
            root = self._settings.adapters
            await asyncio.to_thread(self._file.unloaded, name, root is not None and os.path.isdir(root / name))
        shared, poll = store.is_named(info.digest), POLL_SECONDS
        while not is_gone and not shared and time.monotonic() - start < drain_seconds:
            await asyncio.sleep(poll)
            poll = min(2 * poll, MAX_POLL_SECONDS)
            is_gone = await loop.call(lambda engine: _pages_held(engine, info.digest) == 0) and not store.holds(
                info.digest
            )
        freed = is_gone and not shared
        return Unloaded(freed, shared, pages * freed, info.nbytes * freed, time.monotonic() - start)

    async def watch(self, loop: EngineLoop) -> None:
        """Follows the watched directory and the state file until it is cancelled."""
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            try:
                await self.look(loop)
            except ApiError:
                pass  # the engine is not to be had now
            except Exception as error:  # noqa: BLE001  the next look may do better
                logger.warning("looking for adapters failed: %r", error)

    async def look(self, loop: EngineLoop) -> None:
        """Registers what has come (or changed) and has not changed since the last look; unregisters what has gone."""
        before, self._seen = self._seen, await asyncio.to_thread(self._wanted)
        come = [name for name, one in self._seen.items() if before.get(name) == one != self._registered.get(name)]
        gone = [name for name in self._registered if name not in self._seen and name not in before]
        await asyncio.gather(*(self._follow(loop, name) for name in come + gone))

    async def _follow(self, loop: EngineLoop, name: str) -> None:
        async with self._alone(name):
            one = self._seen.get(name)
            if one is None:
                self._registered.pop(name, None)
                self.refused.pop(name, None)
                if loop.engine.store.has(name):
                    await loop.call(lambda engine: engine.unload_adapter(name))
                    logger.info("adapter %r is gone", name)
            elif one != self._registered.get(name):
                try:
                    await self._bring(loop, name, one)
                    logger.info("adapter %r registered", name)
                except AdapterError as error:
                    self._registered[name] = one  # until it changes
                    self._refuse(name, str(error))

    async def _bring(self, loop: EngineLoop, name: str, one: Wanted) -> AdapterInfo:
        async with self._readers:
            prepared = await asyncio.to_thread(self._read, loop.engine, name, one)
        try:
            info = await loop.call(lambda engine: engine.publish_adapter(prepared))
        except ApiError:
            loop.engine.discard_adapter(prepared)
            raise
        self._registered[name] = one
        self.refused.pop(name, None)
        return info

    def _read(self, engine: Engine, name: str, one: Wanted) -> PreparedAdapter:
        self._roots.check(one.directory)
        prepared = engine.prepare_adapter(name, one.directory)
        try:
            self._roots.check(one.directory)  # nobody changed a link meanwhile
        except AdapterError:
            engine.discard_adapter(prepared)
            raise
        return prepared

    def _read_or_reason(self, engine: Engine, name: str, one: Wanted) -> PreparedAdapter | str:
        try:
            return self._read(engine, name, one)
        except AdapterError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            return repr(error)

    def _wanted(self) -> dict[str, Wanted]:
        """What should be registered now, by the watched directory and by what clients changed. Reads disks."""
        changes = self._file.read()
        root = self._settings.adapters
        found = {} if root is None else adapters_in(root)
        wanted = {
            name: Wanted(root / name, version)  # type: ignore[operator]
            for name, version in found.items()
            if name not in changes.unloaded and name != self._settings.base_name
        }
        for name, directory in changes.loaded.items():
            wanted[name] = Wanted(Path(directory), version_of(Path(directory)))
        return wanted

    def _refuse(self, name: str, reason: str) -> None:
        self.refused[name] = reason
        logger.warning("adapter %r is left out: %s", name, reason)

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> Any:
        """What is done to one name is done one after the other."""
        lock, waiting = self._one_at_a_time.get(name, (asyncio.Lock(), 0))
        self._one_at_a_time[name] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._one_at_a_time.pop(name)
            if waiting > 1:
                self._one_at_a_time[name] = lock, waiting - 1


class StateFile:
    """What clients changed, in JSON. Several servers may share it; None: nothing is remembered."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> Changes:
        """Nothing, if there is no file; an unreadable one is logged and left alone."""
        if self._path is None:
            return Changes({}, frozenset())
        try:
            data = json.loads(self._path.read_text())
            return Changes({str(k): str(v) for k, v in data["loaded"].items()}, frozenset(map(str, data["unloaded"])))
        except FileNotFoundError:
            return Changes({}, frozenset())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read, so loads and unloads of before are forgotten: %r", self._path, error)
            return Changes({}, frozenset())

    def loaded(self, name: str, directory: Path | None) -> None:
        """A client loaded `name`. directory None: it lies in the watched directory, under that name."""
        with self._changing() as changes:
            elsewhere = {} if directory is None else {name: str(directory)}
            kept = {k: v for k, v in changes.loaded.items() if k != name}
            self._write(Changes(kept | elsewhere, changes.unloaded - {name}))

    def unloaded(self, name: str, is_watched: bool) -> None:
        """A client unloaded `name`. is_watched: the watched directory has an adapter of this name."""
        with self._changing() as changes:
            kept = {k: v for k, v in changes.loaded.items() if k != name}
            self._write(Changes(kept, changes.unloaded | {name} if is_watched else changes.unloaded))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Changes]:
        if self._path is None:
            yield self.read()
            return
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self.read()
        except OSError as error:
            logger.warning("%s cannot be written, so a restart will not know of this change: %s", self._path, error)

    def _write(self, changes: Changes) -> None:
        if self._path is None:
            return
        new = self._path.with_suffix(f".{os.getpid()}.tmp")
        new.write_text(json.dumps({"loaded": changes.loaded, "unloaded": sorted(changes.unloaded)}, indent=1) + "\n")
        os.replace(new, self._path)


def _pages_held(engine: Engine, digest: str) -> int:
    resident = engine.residency.find(digest)
    return 0 if resident is None else len(resident.pages)
