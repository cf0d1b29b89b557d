"""The group of processes that serve one model: their messages, and the shutdown of all when one is lost.

The end of a connection reveals a lost process at once. A watcher thread per connection sees it even while the main
thread hangs in a collective.
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
from slora_jax.engine.step_spec import StepSpec
from slora_jax.errors import ConfigError, ProcessLostError
from slora_jax.models import Params

EXIT_LOST = 3
"""Exit status of a process that ends because another is lost."""

LEADER = 0
_GRACE_SECONDS = 3.0  # for the leader's main thread to raise the error; it may hang in a collective


class ProcessGroup:
    """This process's view of the group that serves one model, made by `join_processes`.

    Process 0 makes an `Engine` with it, the others a `Follower`. Followers are connected to the leader only.

    When a process is lost, a follower exits with status 3 at once. The leader raises `ProcessLostError` from its next
    call; it exits with status 3 if its main thread makes none within 3 seconds, and at its regular exit. JAX detects a
    process that hangs with open connections (`join_processes`).

    Attributes:
      process_id: number of this process, from 0.
      num_processes: number of processes.
      lost: the reason why the group cannot continue, or None.
    """

    def __init__(
        self,
        process_id: int,
        num_processes: int,
        connections: Mapping[int, Connection],
        make_device: Callable[[StepSpec, Params, EngineConfig, ProcessGroup], Device],
    ) -> None:
        """Starts a watcher per connection. `connections` are by process number; `make_device` is for process 0."""
        self._make_device = make_device
        self.process_id = process_id
        self.num_processes = num_processes
        self.lost: str | None = None
        self._connections = dict(connections)
        self._inbox: dict[int, SimpleQueue[Call | None]] = {peer: SimpleQueue() for peer in connections}
        self._is_serving = self._is_closed = False
        self._lost_lock = threading.Lock()
        self._has_lost, self._is_handled = threading.Event(), threading.Event()
        for peer in connections:
            threading.Thread(target=self._watch, args=(peer,), name=f"watch process {peer}", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        return self.process_id == LEADER

    @property
    def peers(self) -> list[int]:
        """Numbers of the connected processes."""
        return list(self._connections)

    # Messages

    def send(self, process: int, frame: bytes) -> None:
        """Sends an encoded call (`distributed.channel.encode`) from any thread. Blocks while the network is busy.

        Raises:
          ProcessLostError: a process is lost. The main thread must also call `check`, or the process is ended.
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
        """Sends a call from the main thread to process `to`, or to all peers. Raises as `send`."""
        frame = encode(name, arguments, arrays)
        try:
            for peer in self._connections if to is None else (to,):
                self.send(peer, frame)
        except ProcessLostError:
            self._mark_handled()
            raise

    def next(self, process: int) -> Call:
        """Waits for the next call from `process`. Raises ProcessLostError if it has left, or any process is lost."""
        call = self._inbox[process].get()
        if call is None:
            self.check()
            raise ProcessLostError(f"process {process} has left")
        return call

    def agree(self, settings: Mapping[str, Any], num_pages: int, is_given: bool) -> int:
        """Checks that all processes have the same settings, and agrees on the number of pages.

        From here until `leave`, a process that leaves counts as lost.

        Args:
          settings: plain values by name.
          num_pages: pages that this process can hold.
          is_given: whether the leader's `num_pages` is fixed by the user; otherwise all use the minimum.

        Returns:
          The number of pages for all processes.

        Raises:
          ConfigError: a setting differs. Raised in all processes, with both values.
        """
        self._is_serving = True
        own = json.loads(json.dumps(settings))
        if not self.is_leader:
            self.tell("settings", {"settings": own, "num_pages": num_pages})
            answer = self.next(LEADER)
            if answer.name != "agreed":
                raise self._rejected(str(answer.arguments.get("error")))
            return int(answer.arguments["num_pages"])
        pages = [num_pages]
        for peer in self.peers:
            theirs = self.next(peer).arguments
            if reason := difference(own, theirs["settings"], peer):
                self.tell("refused", {"error": reason})
                raise self._rejected(reason)
            pages.append(int(theirs["num_pages"]))
        agreed = num_pages if is_given else min(pages)
        self.tell("agreed", {"num_pages": agreed})
        return agreed

    def _rejected(self, reason: str) -> ConfigError:
        """Closes the group and returns the error of processes with different settings."""
        self._is_closed = True
        return ConfigError(reason)

    def device(self, spec: StepSpec, params: Params, config: EngineConfig) -> Device:
        """Makes the device of process 0, whose calls the followers repeat."""
        return self._make_device(spec, params, config, self)

    def leave(self) -> None:
        """Ends serving when the leader's engine is closed: the followers return from `Follower.run`."""
        if self._is_serving and self.lost is None:
            self._is_serving = False
            self.tell("stop", {})

    def close(self) -> None:
        """Closes the connections and shuts down `jax.distributed`, which waits for all processes. Idempotent."""
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

    # Lost processes

    def check(self) -> None:
        """Raises `ProcessLostError` in the main thread if a process is lost."""
        if self.lost is not None:
            self._mark_handled()
            raise ProcessLostError(self.lost)

    def explained(self, error: BaseException) -> ProcessLostError:
        """Returns the error to raise when a call that all processes make together fails with `error`.

        It names the lost process that caused the failure. If none is lost, this process failed, and the others receive
        its error.
        """
        if not self._has_lost.wait(1.0):  # a collective may fail before the end of a connection is seen
            self.fail(error)
        self._mark_handled()
        return ProcessLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """Ends all processes because this one failed with `error`."""
        self._is_handled.set()
        self._lose(f"process {self.process_id} failed: {error!r}")

    def _mark_handled(self) -> None:
        """Records that the leader's main thread raises the error, so that the process is not ended. A follower is ended
        anyway: JAX would soon end it with a less clear message."""
        if self.is_leader:
            self._is_handled.set()

    def _lose(self, reason: str) -> None:
        """Records the loss, wakes all waiting threads and sends the reason to the peers. Any thread may call it."""
        with self._lost_lock:
            if self.lost is not None or self._is_closed:
                return
            self.lost = reason
        self._has_lost.set()
        for inbox in self._inbox.values():
            inbox.put(None)
        threading.Thread(target=self._exit_unless_handled, name="exit after a loss", daemon=True).start()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(encode("lost", {"why": reason}), timeout=0.5)

    def _exit_unless_handled(self) -> None:
        """Ends this process unless its main thread raises the error."""
        if not self._is_handled.wait(_GRACE_SECONDS if self.is_leader else 0):
            os.write(2, f"slora: error: {self.lost}\n".encode())
            os._exit(EXIT_LOST)

    def _watch(self, peer: int) -> None:
        """Receives calls from a process until it is lost or leaves."""
        reason = f"process {peer} is lost: its connection ended"
        try:
            while (call := self._connections[peer].receive()) is not None:
                if call.name == "lost":
                    reason = str(call.arguments.get("why"))
                    break
                if call.name == "stop":
                    self._is_serving = False
                if call.name == "bye":
                    if not self._is_serving:
                        self._inbox[peer].put(None)
                        return
                    reason = f"process {peer} ended while a model was being served"
                    break
                self._inbox[peer].put(call)
        except (OSError, FrameError) as error:
            reason = f"process {peer} is lost: {error}"
        self._lose(reason)

    def at_exit(self) -> None:
        """Closes the group, or exits with status 3 if a process is lost: JAX's own shutdown would wait for it."""
        if self.lost is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(EXIT_LOST)
        self.close()


def difference(own: Mapping[str, Any], theirs: Mapping[str, Any], process: int) -> str | None:
    """Returns a message about the first setting that differs between `process` and the leader, or None."""
    for name in {**own, **theirs}:
        if own.get(name) != theirs.get(name):
            values = f"process 0 has {own.get(name)!r}, process {process} has {theirs.get(name)!r}"
            return f"{name}: {values}; give all processes the same"
    return None
