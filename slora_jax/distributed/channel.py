"""Calls between processes over TCP, as a JSON header and raw arrays. Received data is never executed.

A frame is `SLRA`, the header's length (uint32), the body's length (uint64), the header, and the body. The header is
JSON: the call's name, its plain arguments, and the dtype and shape of each array. The body is the arrays' bytes.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER = 1 << 20
MAX_BODY = 1 << 33
"""Bytes, more than an adapter of the largest models and ranks."""

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"SLRA"
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (("int32", np.int32), ("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16))
}
_SILENCE_SECONDS = 8
"""Silence after which a machine's connection counts as lost. The end of a process is detected at once."""


class FrameError(ValueError):
    """The received data is not a frame: the peer is not a slora-jax process, or has another version."""


@dataclass(frozen=True)
class Call:
    """A call's name, its plain arguments by name, and its arrays."""

    name: str
    arguments: dict[str, Any]
    arrays: tuple[np.ndarray, ...] = ()


def encode(name: str, arguments: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """Encodes a call as a frame."""
    shapes = [(array.dtype.name, array.shape) for array in arrays]
    header = json.dumps([name, arguments, shapes], separators=(",", ":")).encode()
    body = [array.tobytes() for array in arrays]
    return b"".join((_PREFIX.pack(_MAGIC, len(header), sum(map(len, body))), header, *body))


class Connection:
    """One end of a TCP connection. Any thread may `send`; one thread calls `receive`."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._sending = threading.Lock()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", 2),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", (_SILENCE_SECONDS - 2) // 2),
            ("TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),  # for sent data without acknowledgement
        ):
            if hasattr(socket, option):  # only Linux has all of them
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, frame: bytes, timeout: float = -1) -> bool:
        """Sends a frame. Blocks while the peer's receive buffer is full.

        Args:
          timeout: seconds to wait for another thread that is sending; -1 waits forever.

        Returns:
          Whether the frame was sent before the timeout.

        Raises:
          OSError: the connection is lost.
        """
        if not self._sending.acquire(timeout=timeout):
            return False
        try:
            self._socket.sendall(frame)
        finally:
            self._sending.release()
        return True

    def receive(self) -> Call | None:
        """Returns the next call, or None if the peer closed the connection between two frames.

        Raises:
          FrameError: the data is not a frame, or ends within one.
          OSError: the connection is lost.
        """
        prefix = bytearray(_PREFIX.size)
        if not self._fill(memoryview(prefix), may_end=True):
            return None
        magic, header_size, body_size = _PREFIX.unpack(prefix)
        if magic != _MAGIC or header_size > MAX_HEADER or body_size > MAX_BODY:
            raise FrameError(f"not a frame: it begins with {bytes(prefix)!r}")
        header = bytearray(header_size)
        self._fill(memoryview(header))
        name, arguments, shapes = _parse(bytes(header), body_size)
        arrays = tuple(np.empty(shape, dtype) for dtype, shape in shapes)
        for array in arrays:
            if array.size:
                self._fill(memoryview(array.reshape(-1).view(np.uint8)))
        return Call(name, arguments, arrays)

    def close(self) -> None:
        """Closes the connection in both directions; a thread in `receive` returns."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # already lost
            pass
        self._socket.close()

    def _fill(self, buffer: memoryview, may_end: bool = False) -> bool:
        """Fills the buffer. With `may_end`, returns False if the connection ends before the first byte."""
        done = 0
        while done < len(buffer):
            count = self._socket.recv_into(buffer[done:])
            if count == 0:
                if may_end and done == 0:
                    return False
                raise FrameError(f"the connection ended within a frame, {len(buffer) - done} bytes early")
            done += count
        return True


def _parse(header: bytes, body_size: int) -> tuple[str, dict[str, Any], list[tuple[np.dtype, tuple[int, ...]]]]:
    try:
        name, arguments, described = json.loads(header)
        shapes = [(_DTYPES[dtype], tuple(shape)) for dtype, shape in described]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FrameError(f"a frame has an invalid header: {error!r}") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise FrameError("a frame's header has no name or no arguments")
    for _, shape in shapes:
        if len(shape) > 8 or any(type(size) is not int or not 0 <= size <= MAX_BODY for size in shape):
            raise FrameError(f"a frame's array has an invalid shape {shape}")
    expected = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)
    if expected != body_size:
        raise FrameError(f"a frame's arrays need {expected} bytes, but its body has {body_size}")
    return name, arguments, shapes
