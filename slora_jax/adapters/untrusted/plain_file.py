"""Opens untrusted files without blocking, if they are regular files."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from slora_jax.errors import AdapterError


def open_plain(path: Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading: a FIFO could block, and a device can do anything.

    Raises FileNotFoundError, or AdapterError naming the file if it is not a regular file or cannot be opened.
    """
    try:
        _check_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = open(descriptor, "rb")  # noqa: SIM115  the caller closes it
        try:
            _check_regular(path, os.fstat(descriptor))  # it may have been replaced since `os.stat`
        except BaseException:
            file.close()
            raise
        return file
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: cannot be read: {error}") from None


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{path}: cannot be read: not a regular file")
