"""Adapters on disk: the directories they may be loaded from, and the file that keeps clients' changes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora_jax.adapters.peft_format import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from slora_jax.errors import AdapterError
from slora_jax.serving.http.errors import ApiError

logger = logging.getLogger("slora_jax.serving")

Version = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and modification time (ns) of each file of an adapter, None for a missing one. Another adapter in the
same directory has another version."""


class AdapterRoots:
    """The directories from which adapters may be loaded. Links in their own paths are resolved once."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve(strict=True) for root in roots]

    def find(self, path: str) -> Path:
        """Returns the adapter directory at an absolute path, or at a path relative to a root.

        Raises:
          ApiError: 403 if the directory or a file in it leads out of the roots, whether or not it exists; 404 if there
            is no directory.
        """
        try:
            inside = [found for root in self._roots if self._holds(found := Path(os.path.realpath(root / path)))]
            there = [found for found in inside if found.is_dir()]
            if there:
                self.check(there[0])
                return there[0]
        except AdapterError as error:
            raise _forbidden(str(error)) from None
        except (OSError, ValueError) as error:  # too long, a zero byte
            raise ApiError(400, f"lora_path: {error}", code="invalid_path", param="lora_path") from None
        if inside:
            raise ApiError(404, f"lora_path={path!r}: no such directory", code="adapter_not_found", param="lora_path")
        raise _forbidden(f"lora_path={path!r} is outside the directories from which adapters may be loaded")

    def check(self, directory: Path) -> None:
        """Raises AdapterError if the directory, or a file that would be read from it, leads out of the roots."""
        for path in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE):
            if not self._holds(Path(os.path.realpath(path))):
                raise AdapterError(f"{path.name!r} is a link out of the directories from which adapters may be loaded")

    def _holds(self, path: Path) -> bool:
        return any(path == root or root in path.parents for root in self._roots)


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, kind="permission_error", code="forbidden_path", param="lora_path")


def adapters_in(root: Path) -> dict[str, Version]:
    """Returns the adapter directories in `root` by name, without hidden ones."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            version = version_of(Path(entry.path))
            if any(version) and not entry.name.startswith("."):
                found[entry.name] = version
    return dict(sorted(found.items()))


def version_of(directory: Path) -> Version:
    """Returns the version of the adapter in a directory."""
    return tuple(_stamp(directory / file) for file in ADAPTER_FILES)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Changes:
    """Changes that clients made.

    Attributes:
      loaded: directory of each adapter that clients loaded, by name.
      unloaded: sizes and times of the files of each adapter of the watched directory that clients unloaded, by name.
    """

    loaded: dict[str, str]
    unloaded: dict[str, Any]

    def has_unloaded(self, name: str, version: Version) -> bool:
        """Returns whether a client unloaded these files. Files deployed since then are another adapter."""
        return name in self.unloaded and self.unloaded[name] in (None, _contents(version))


class StateFile:
    """The changes in JSON. Several servers may share the file. Without a file, or with one that cannot be read or
    written, the changes last as long as this process."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = Changes({}, {})  # read or written last

    def read(self) -> Changes:
        """Returns all changes so far."""
        if self._path is None:
            return self._known
        try:
            data = json.loads(self._path.read_text())
            loaded = {str(name): str(directory) for name, directory in data["loaded"].items()}
            unloaded = data["unloaded"]  # earlier versions wrote a list of names
            self._known = Changes(loaded, unloaded if isinstance(unloaded, dict) else dict.fromkeys(map(str, unloaded)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read: %r", self._path, error)
        return self._known

    def loaded(self, name: str, directory: Path | None) -> None:
        """Records that a client loaded an adapter.

        Args:
          directory: None if it is the folder of this name in the watched directory.
        """
        elsewhere = {} if directory is None else {name: str(directory)}
        self._change(
            lambda changes: Changes(_without(name, changes.loaded) | elsewhere, _without(name, changes.unloaded))
        )

    def unloaded(self, name: str, version: Version | None) -> None:
        """Records that a client unloaded an adapter.

        Args:
          version: of the folder of this name in the watched directory, None if there is none.
        """
        more = {} if version is None else {name: _contents(version)}
        self._change(lambda changes: Changes(_without(name, changes.loaded), changes.unloaded | more))

    def _change(self, change: Callable[[Changes], Changes]) -> None:
        if self._path is None:
            self._known = change(self._known)
            return
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # against other servers, and other threads of this one
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
    """Returns sizes and times as JSON has them, without inodes, which may differ after a restart."""
    return [stamp and list(stamp[1:]) for stamp in version]
