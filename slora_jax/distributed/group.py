"""Several processes that serve one model together: their messages, and how the loss of one ends them all.

Process 0 leads. A lost process is noticed at once, by the end of its connection; the watching threads see it even while
the main thread is inside a collective that will never end.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np

from slora_jax.distributed.channel import Call, Connection, FrameError, encode
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.device import Device
from slora_jax.engine.step import StepSpec
from slora_jax.errors import ConfigError, ProcessLostError
from slora_jax.models import Params

EXIT_LOST = 3
"""Exit status of a process that ends because another one is lost."""

LEADER = 0
_GRACE_SECONDS = 3.0  # for the leader's main thread to notice a loss by itself; it may be inside a collective


class ProcessGroup:
    """This process among those that serve a model together, from `join_processes`.

    Process 0 makes an `Engine` with it, the others a `Follower`. Every follower has a connection to the leader, and
    none to another follower. lost: why the processes cannot go on; then whoever waits gets a `ProcessLostError`.
    A follower ends with exit status 3 as soon as it is lost; the leader does if nobody has asked for the error within 3
    seconds, and at its exit. A process that hangs, with its connections open, is JAX's to notice (`join_processes`).
    """

    def __init__(
        self,
        process_id: int,
        num_processes: int,
        connections: Mapping[int, Connection],
        make_device: Callable[[StepSpec, Params, EngineConfig, ProcessGroup], Device],
    ) -> None:
        """connections: by process; to all followers, or to the leader. make_device: of process 0."""
        self._make_device = make_device
        self.process_id = process_id
        self.num_processes = num_processes
        self.lost: str | None = None
        self._connections = dict(connections)
        self._inbox: dict[int, SimpleQueue[Call | None]] = {peer: SimpleQueue() for peer in connections}
        self._is_serving = self._is_closed = False
        self._losing = threading.Lock()
        self._has_lost, self._is_noticed = threading.Event(), threading.Event()
        for peer in connections:
            threading.Thread(target=self._watch, args=(peer,), name=f"watch process {peer}", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        return self.process_id == LEADER

    @property
    def peers(self) -> list[int]:
        """The processes at the other ends of the connections."""
        return list(self._connections)

    # What is said

    def send(self, process: int, frame: bytes) -> None:
        """Sends a call (`distributed.channel.encode`) from any thread; waits while the network takes no more.

        Raises:
          ProcessLostError: it, or another process, is lost. The main thread has yet to notice.
        """
        if self.lost is None:
            try:
                self._connections[process].send(frame)
            except OSError as error:
                self._lose(f"process {process} is lost: {error}")
        if self.lost is not None:
            raise ProcessLostError(self.lost)

    def tell(
        self, name: str, arguments: dict[str, Any], arrays: Sequence[np.ndarray] = (), to: int | None = None
    ) -> None:
        """Sends a call to a process at the other ends, or to all. For the main thread.

        Raises:
          ProcessLostError: a process is lost.
        """
        frame = encode(name, arguments, arrays)
        try:
            for peer in self._connections if to is None else (to,):
                self.send(peer, frame)
        except ProcessLostError:
            self._notice()
            raise

    def next(self, process: int) -> Call:
        """Waits for the next call from a process.

        Raises:
          ProcessLostError: it, or another process, is lost, or has left.
        """
        call = self._inbox[process].get()
        if call is None:
            self.check()
            raise ProcessLostError(f"process {process} has left")
        return call

    def agree(self, settings: Mapping[str, Any], num_pages: int, is_given: bool) -> int:
        """Compares what must be equal in all processes, plain values by name, and returns the number of pages that all
        take: the leader's, if it `is_given`, else the least. From here until `leave` a lost process is an error.

        Raises:
          ConfigError: a setting differs; raised in all processes, with both values.
        """
        self._is_serving = True
        own = json.loads(json.dumps(settings))
        if not self.is_leader:
            self.tell("settings", {"settings": own, "num_pages": num_pages})
            answer = self.next(LEADER)
            if answer.name != "agreed":
                raise self._parted(str(answer.arguments.get("error")))
            return int(answer.arguments["num_pages"])
        pages = [num_pages]
        for peer in self.peers:
            theirs = self.next(peer).arguments
            if why := difference(own, theirs["settings"], peer):
                self.tell("refused", {"error": why})
                raise self._parted(why)
            pages.append(int(theirs["num_pages"]))
        agreed = num_pages if is_given else min(pages)
        self.tell("agreed", {"num_pages": agreed})
        return agreed

    def _parted(self, why: str) -> ConfigError:
        """The error of processes that cannot serve together; each ends by itself."""
        self._is_closed = True
        return ConfigError(why)

    def device(self, spec: StepSpec, params: Params, config: EngineConfig) -> Device:
        """The device of process 0, whose calls the others make too."""
        return self._make_device(spec, params, config, self)

    def leave(self) -> None:
        """The leader's engine is closed: the followers return from `Follower.run`."""
        if self._is_serving and self.lost is None:
            self._is_serving = False
            self.tell("stop", {})

    def close(self) -> None:
        """Takes leave of the others and of JAX's coordination service, which waits for all. May be called twice."""
        if self._is_closed or self.lost is not None:
            return
        if self.is_leader:
            self.leave()
        self._is_closed = True
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(encode("bye", {}))
        jax.distributed.shutdown()
        for connection in self._connections.values():
            connection.close()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        elif not self._is_closed:
            self.fail(error)

    # When a process is lost

    def check(self) -> None:
        """Raises ProcessLostError if a process is lost. For the main thread."""
        if self.lost is not None:
            self._notice()
            raise ProcessLostError(self.lost)

    def explained(self, error: BaseException) -> ProcessLostError:
        """What to raise for an error in a call that all processes make together: the lost process that caused it, or
        the failure of this one, which the others are told."""
        if not self._has_lost.wait(1.0):  # the error of a collective may come before the end of a connection is seen
            self.fail(error)
        self._notice()
        return ProcessLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """This process cannot go on, and tells the others why. They end."""
        self._is_noticed.set()
        self._lose(f"process {self.process_id} failed: {error!r}")

    def _notice(self) -> None:
        """The main thread has the error. A follower's is ended all the same: there is nothing it could do but end, and
        JAX would soon do it with a message of its own."""
        if self.is_leader:
            self._is_noticed.set()

    def _lose(self, why: str) -> None:
        with self._losing:
            if self.lost is not None or self._is_closed:
                return
            self.lost = why
        self._has_lost.set()
        for inbox in self._inbox.values():
            inbox.put(None)
        threading.Thread(target=self._end_unnoticed, name="end of a lost process", daemon=True).start()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(encode("lost", {"why": why}), timeout=0.5)

    def _end_unnoticed(self) -> None:
        """Ends this process, unless its main thread has an error to raise."""
        if not self._is_noticed.wait(_GRACE_SECONDS if self.is_leader else 0):
            os.write(2, f"slora: error: {self.lost}\n".encode())
            os._exit(EXIT_LOST)

    def _watch(self, peer: int) -> None:
        """Receives what a process sends until it is lost or leaves."""
        why = f"process {peer} is lost: its connection ended"
        try:
            while (call := self._connections[peer].receive()) is not None:
                if call.name == "lost":
                    why = str(call.arguments.get("why"))
                    break
                if call.name == "stop":
                    self._is_serving = False
                if call.name == "bye":
                    if not self._is_serving:
                        self._inbox[peer].put(None)
                        return
                    why = f"process {peer} ended while a model was being served"
                    break
                self._inbox[peer].put(call)
        except (OSError, FrameError) as error:
            why = f"process {peer} is lost: {error}"
        self._lose(why)

    def at_exit(self) -> None:
        """JAX's own farewell would wait for a process that is lost."""
        if self.lost is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(EXIT_LOST)
        self.close()


def difference(own: Mapping[str, Any], theirs: Mapping[str, Any], process: int) -> str | None:
    """The first setting by which another process differs from the leader."""
    for name in {**own, **theirs}:
        if own.get(name) != theirs.get(name):
            values = f"process 0 has {own.get(name)!r}, process {process} has {theirs.get(name)!r}"
            return f"{name}: {values}; give all processes the same"
    return None
