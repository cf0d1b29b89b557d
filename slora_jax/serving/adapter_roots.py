"""Where adapters may be loaded from: inside the configured directories, whatever a path or a link says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from slora_jax.adapters.peft_format import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from slora_jax.errors import AdapterError
from slora_jax.serving.errors import ApiError

Version = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change of an adapter's files: what differs when another adapter lies there."""


class AdapterRoots:
    """The directories, with every link in their own paths resolved once."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve(strict=True) for root in roots]

    def find(self, path: str) -> Path:
        """The adapter directory that a client means: an absolute path, or one relative to a root.

        Raises:
          ApiError: 403, it (or a file of it) leads out of the roots, whether or not there is anything there; 404, there
            is no adapter.
        """
        try:
            inside = [found for root in self._roots if self._holds(found := Path(os.path.realpath(root / path)))]
            there = [found for found in inside if found.is_dir()]
            if there:
                self.check(there[0])
                return there[0]
        except AdapterError as error:
            raise ApiError(403, str(error), kind="permission_error", code="forbidden_path", param="lora_path") from None
        except (OSError, ValueError) as error:  # too long, a zero byte
            raise ApiError(400, f"lora_path: {error}", code="invalid_path", param="lora_path") from None
        if inside:
            raise ApiError(404, f"lora_path={path!r}: no such directory", code="adapter_not_found", param="lora_path")
        raise ApiError(
            403,
            f"lora_path={path!r} is outside the directories from which adapters may be loaded",
            kind="permission_error",
            code="forbidden_path",
            param="lora_path",
        )

    def check(self, directory: Path) -> None:
        """Raises AdapterError if the directory, or a file that would be read of it, leads out of the roots."""
        for path in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE):
            if not self._holds(Path(os.path.realpath(path))):
                raise AdapterError(f"{path.name!r} is a link out of the directories from which adapters may be loaded")

    def _holds(self, path: Path) -> bool:
        return any(path == root or root in path.parents for root in self._roots)


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
    """Of the files that say whether, and which, adapter lies there; None for one that is not there."""
    return tuple(_stamp(directory / file) for file in ADAPTER_FILES)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
