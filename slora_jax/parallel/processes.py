"""Several processes that serve one model together: how they find each other, and how the loss of one ends them all.

Process 0 leads. JAX's coordination service listens on the coordinator's port, the leader's channel to each follower on
the next one. A connection that ends tells of a lost process at once; the watching threads see it even while the main
thread is inside a collective that will never end.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from queue import SimpleQueue
from typing import Any

import jax
import jaxlib
import numpy as np

from slora_jax.errors import ConfigError, ProcessLostError
from slora_jax.parallel.channel import Call, Connection, FrameError, encode

EXIT_LOST = 3
"""Exit status of a process that ends because another one is lost."""

LEADER = 0
_GRACE_SECONDS = 3.0  # for the leader's main thread to notice a loss by itself; it may be inside a collective
_HEARTBEAT_SECONDS = 30  # JAX's: of a process that hangs
_HELLO_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


class ProcessGroup:
    """This process among those that serve a model together, from `join_processes`.

    Process 0 makes an `Engine` with it, the others a `Follower`. Every follower has a connection to the leader, and
    none to another follower. lost: why the processes cannot go on; then whoever waits gets a `ProcessLostError`.
    A follower ends with exit status 3 as soon as it is lost; the leader does if nobody has asked for the error within 3
    seconds, and at its exit.
    """

    def __init__(self, process_id: int, num_processes: int, connections: Mapping[int, Connection]) -> None:
        """connections: by process; to all followers, or to the leader."""
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
        """Sends a call (`parallel.channel.encode`). For any thread; waits while the network takes no more.

        Raises:
          ProcessLostError: it, or another process, is lost.
        """
        self.check()
        try:
            self._connections[process].send(frame)
        except OSError as error:
            self._lose(f"the connection to process {process} is lost: {error}")
            raise self.explained(error) from error

    def tell(self, name: str, arguments: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends a call to all at the other ends. Raises as `send`."""
        frame = encode(name, arguments, arrays)
        for peer in self._connections:
            self.send(peer, frame)

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
            if difference := _difference(own, theirs["settings"], peer):
                self.tell("refused", {"error": difference})
                raise self._parted(difference)
            pages.append(int(theirs["num_pages"]))
        agreed = num_pages if is_given else min(pages)
        self.tell("agreed", {"num_pages": agreed})
        return agreed

    def _parted(self, why: str) -> ConfigError:
        """The error of processes that cannot serve together; each ends by itself."""
        self._is_closed = True
        return ConfigError(why)

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
        """Raises ProcessLostError if a process is lost."""
        if self.lost is not None:
            self._is_noticed.set()
            raise ProcessLostError(self.lost)

    def explained(self, error: BaseException) -> ProcessLostError:
        """What to raise for an error in a call that all processes make together: the lost process that caused it, or
        the failure of this one, which the others are told."""
        if not self._has_lost.wait(1.0):  # the error of a collective may come before the end of a connection is seen
            self.fail(error)
        self._is_noticed.set()
        return ProcessLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """This process cannot go on, and tells the others why. They end."""
        self._is_noticed.set()
        self._lose(f"process {self.process_id} failed: {error!r}")

    def _lose(self, why: str) -> None:
        with self._losing:
            if self.lost is not None or self._is_closed:
                return
            self.lost = why
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(encode("lost", {"why": why}), timeout=0.5)
        self._has_lost.set()
        for inbox in self._inbox.values():
            inbox.put(None)
        threading.Thread(target=self._end_unnoticed, name="end of a lost process", daemon=True).start()

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


def join_processes(coordinator: str, num_processes: int, process_id: int, timeout: float = 300.0) -> ProcessGroup:
    """Joins the processes that serve a model together, and starts `jax.distributed`. Called by each of them, before
    JAX has touched a device; waits up to `timeout` seconds for all to come.

    coordinator: `HOST:PORT` of process 0, reachable from all; process 0 also listens on `PORT + 1` of that address.
    Neither port is encrypted or asks who is there: keep them inside the cluster.

    Raises:
      ConfigError: an argument is out of range; a port is in use; the others do not come in time, or are of another
        version.
    """
    host, port = _address(coordinator)
    if num_processes < 2:
        raise ConfigError(f"num_processes={num_processes}: must be at least 2; one process needs no coordinator")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id={process_id}: must be in 0..{num_processes - 1} (num_processes={num_processes})")
    deadline = time.monotonic() + timeout
    hello = {
        "num_processes": num_processes,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "slora-jax": version("slora-jax"),
    }
    if process_id == LEADER:
        connections = _welcome(host, port, hello, deadline)
    else:
        connections = {LEADER: _connect(host, port + 1, process_id, hello, deadline)}
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(1, int(deadline - time.monotonic())),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise ConfigError(f"coordinator={coordinator!r}: jax.distributed: {error}") from error
    group = ProcessGroup(process_id, num_processes, connections)
    atexit.register(group.at_exit)
    return group


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigError(f"coordinator={coordinator!r}: must be HOST:PORT, PORT in 1..65534 (PORT + 1 is used too)")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"coordinator: process 0 cannot listen on {host}:{port}: {error}; give an address of its machine, and a "
            "port that is free, as is the one after it"
        ) from None


def _welcome(host: str, port: int, hello: dict[str, Any], deadline: float) -> dict[int, Connection]:
    """The leader's connections to all others."""
    _listen(host, port).close()  # JAX's port: its own complaint would end the process
    connections: dict[int, Connection] = {}

    def refuse(why: str) -> ConfigError:
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.send(encode("refused", {"error": why}))
        return ConfigError(why)

    with _listen(host, port + 1) as listener:
        while missing := [p for p in range(1, hello["num_processes"]) if p not in connections]:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                accepted, address = listener.accept()
            except TimeoutError:
                raise refuse(
                    f"coordinator: process {missing} of {hello['num_processes']} did not come in time"
                ) from None
            accepted.settimeout(_HELLO_SECONDS)
            connection = Connection(accepted)
            try:
                call = connection.receive()
            except (OSError, FrameError) as error:
                _LOG.warning("coordinator: %s is none of ours: %s", address, error)
                connection.close()
                continue
            if (
                call is None
                or call.name != "hello"
                or type(number := call.arguments.pop("process_id", None)) is not int
            ):
                _LOG.warning("coordinator: %s is none of ours", address)
                connection.close()
                continue
            accepted.settimeout(None)
            taken = number in connections or not 0 < number < hello["num_processes"]
            why = (
                f"process_id={number}: is in use, or process 0's"
                if taken
                else _difference(hello, call.arguments, number)
            )
            connections[-1 if taken else number] = connection
            if why:
                raise refuse(why)
    for connection in connections.values():
        connection.send(encode("welcome", {}))
    return connections


def _connect(host: str, port: int, process_id: int, hello: dict[str, Any], deadline: float) -> Connection:
    """A follower's connection to the leader, which may not be there yet."""
    while True:
        try:
            connected = socket.create_connection((host, port), timeout=max(0.01, min(5.0, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"coordinator: process 0 cannot be reached at {host}:{port}: {error}") from None
            time.sleep(0.1)
    connection = Connection(connected)
    connected.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        connection.send(encode("hello", hello | {"process_id": process_id}))
        answer = connection.receive()
    except TimeoutError:
        raise ConfigError(f"coordinator: process 0 at {host}:{port} still waits for others") from None
    except (OSError, FrameError) as error:
        raise ConfigError(f"coordinator: no answer from process 0 at {host}:{port}: {error}") from None
    if answer is None or answer.name != "welcome":
        why = "it closed the connection" if answer is None else answer.arguments.get("error", "it is none of ours")
        raise ConfigError(f"coordinator: refused by process 0 at {host}:{port}: {why}")
    connected.settimeout(None)
    return connection


def _difference(own: Mapping[str, Any], theirs: Mapping[str, Any], process: int) -> str | None:
    """The first setting by which another process differs from the leader."""
    for name in {**own, **theirs}:
        if own.get(name) != theirs.get(name):
            values = f"process 0 has {own.get(name)!r}, process {process} has {theirs.get(name)!r}"
            return f"{name}: {values}; give all processes the same"
    return None
