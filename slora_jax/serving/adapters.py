"""Adapters as the service keeps them: what lies in a watched directory, what clients load and unload, and a file that
remembers the difference for the next start."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tqdm import tqdm

from slora_jax.adapters import AdapterInfo
from slora_jax.adapters.peft_format import misplaced
from slora_jax.adapters.store import PreparedAdapter
from slora_jax.engine import Engine
from slora_jax.errors import AdapterError
from slora_jax.phases import advance, phase
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
    """The changes that clients made.

    Attributes:
      loaded: directory of each adapter that they loaded, by name.
      unloaded: sizes and times of the files of each adapter of the watched directory that they unloaded, by name.
    """

    loaded: dict[str, str]
    unloaded: dict[str, Any]

    def has_unloaded(self, name: str, version: Version) -> bool:
        """Returns True if a client unloaded these files; files deployed since then are another adapter."""
        return name in self.unloaded and self.unloaded[name] in (None, _contents(version))


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

    def __init__(self, settings: ServerSettings, on_gone: Callable[[str], None]) -> None:
        """on_gone: told the name of an adapter that was unregistered."""
        self._settings, self._on_gone = settings, on_gone
        self._roots = AdapterRoots(settings.roots)
        self._file = StateFile(settings.state_file or (settings.adapters and settings.adapters / STATE_FILE))
        self._registered: dict[str, Wanted] = {}
        self._seen: dict[str, Wanted] = {}  # at the last look; what changes while it is looked at is not complete
        self._known: set[str] = set()  # names that were registered when the last look began
        self._look_seconds = 0.0  # of CPU time that the last look took, without what it led to
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of names in somebody's hands
        self._readers = asyncio.Semaphore(settings.limits.adapter_loads)
        self._refused: dict[str, str] = {}  # by name: why an adapter cannot be used
        self._left_out: dict[str, str] = {}  # by name: why a folder of the watched directory is not registered

    @property
    def refused(self) -> dict[str, str]:
        """By name, why an adapter that might be expected is not there."""
        return self._left_out | self._refused

    def register_all(self, engine: Engine) -> None:
        """At the start, on the engine's thread, with a progress bar. A bad one is logged and left out."""
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
        return Unloaded(freed, shared, pages * freed, info.nbytes * freed, time.monotonic() - start)

    async def watch(self, loop: EngineLoop) -> None:
        """Follows the watched directory and the state file until it is cancelled; of very many adapters less often, so
        that looking takes no more than 2 % of the time."""
        while True:
            await asyncio.sleep(max(self._settings.watch_seconds, 50 * self._look_seconds))
            try:
                await self.look(loop)
            except ApiError:
                pass  # the engine is not to be had now
            except Exception as error:  # noqa: BLE001  the next look may do better
                logger.warning("looking for adapters failed: %r", error)

    async def look(self, loop: EngineLoop) -> None:
        """Registers what has come (or changed) and has not changed since the last look; unregisters what has gone."""
        before, known_before = self._seen, self._known
        self._known, registered = set(self._registered), dict(self._registered)

        def compare() -> tuple[dict[str, Wanted], list[str]]:
            start = time.thread_time()  # not the time that busy threads make it wait
            seen = self._wanted()
            self._look_seconds = time.thread_time() - start
            come = [name for name, one in seen.items() if before.get(name) == one != registered.get(name)]
            # What a client has just loaded may be registered, and not in the state file yet.
            gone = [name for name in self._known & known_before if name not in seen and name not in before]
            return seen, come + gone

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
                    return  # since the directory was looked at
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
        self._refused.pop(name, None)
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
        """Returns the adapters to register: those of the watched directory, with the changes that clients made. Logs
        the folders that are left out. Reads disks."""
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
        """What is done to one name is done one after the other."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _forget(self, name: str) -> None:
        self._registered.pop(name, None)
        self._refused.pop(name, None)
        self._on_gone(name)


class StateFile:
    """What clients changed, in JSON. Several servers may share it. Without a file, or with one that cannot be read or
    written, this process alone remembers."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = Changes({}, {})  # read or written last

    def read(self) -> Changes:
        """What there is to know."""
        if self._path is None:
            return self._known
        try:
            data = json.loads(self._path.read_text())
            loaded = {str(name): str(directory) for name, directory in data["loaded"].items()}
            unloaded = data["unloaded"]  # of earlier versions a list of names
            self._known = Changes(loaded, unloaded if isinstance(unloaded, dict) else dict.fromkeys(map(str, unloaded)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read: %r", self._path, error)
        return self._known

    def loaded(self, name: str, directory: Path | None) -> None:
        """A client loaded `name`. directory None: it lies in the watched directory, under that name."""
        elsewhere = {} if directory is None else {name: str(directory)}
        self._change(
            lambda changes: Changes(_without(name, changes.loaded) | elsewhere, _without(name, changes.unloaded))
        )

    def unloaded(self, name: str, version: Version | None) -> None:
        """A client unloaded `name`. version: of the files in the watched directory's folder of this name, if it has
        one."""
        more = {} if version is None else {name: _contents(version)}
        self._change(lambda changes: Changes(_without(name, changes.loaded), changes.unloaded | more))

    def _change(self, change: Callable[[Changes], Changes]) -> None:
        if self._path is None:
            self._known = change(self._known)
            return
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # other servers, and this one's other threads
                self._known = change(self.read())
                data = {"loaded": self._known.loaded, "unloaded": self._known.unloaded}
                new = self._path.with_suffix(f".{os.getpid()}.tmp")
                new.write_text(json.dumps(data, indent=1) + "\n")
                os.replace(new, self._path)
        except OSError as error:
            logger.warning("%s cannot be written, so a restart will not know of changes: %s", self._path, error)
            self._path = None
            self._change(change)


def _without[T](name: str, items: dict[str, T]) -> dict[str, T]:
    return {key: item for key, item in items.items() if key != name}


def _contents(version: Version) -> list[list[int] | None]:
    """Sizes and times as JSON has them; without inodes, which a restart may change."""
    return [stamp and list(stamp[1:]) for stamp in version]


def _pages_held(engine: Engine, digest: str) -> int:
    resident = engine.residency.find(digest)
    return 0 if resident is None else len(resident.pages)
