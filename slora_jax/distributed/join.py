"""Rendezvous of the processes that serve one model.

JAX's coordination service listens on the coordinator's port, the leader's channel to its followers on the next port.
The channel is set up first, because JAX ends a process that finds no coordinator.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import socket
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import jax
import jaxlib

from slora_jax.distributed.broadcast import BroadcastDevice
from slora_jax.distributed.channel import Connection, FrameError, encode
from slora_jax.distributed.group import LEADER, ProcessGroup, difference
from slora_jax.errors import ConfigError

_HEARTBEAT_SECONDS = 30  # JAX aborts the other processes this long after one hangs
_HELLO_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


def join_processes(coordinator: str, num_processes: int, process_id: int, timeout: float = 300.0) -> ProcessGroup:
    """Connects the processes that serve one model and starts `jax.distributed`.

    Every process must call it before JAX uses a device. The ports have no encryption or authentication, so keep them
    inside the cluster.

    Args:
      coordinator: `HOST:PORT` of process 0, reachable from all processes. Process 0 also listens on `PORT + 1`.
      num_processes: number of processes, at least 2.
      process_id: number of this process, from 0.
      timeout: seconds to wait for all processes.

    Raises:
      ConfigError: an argument is out of range, a port is in use, or another process does not connect in time or has
        another version.
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
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
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
    group = ProcessGroup(process_id, num_processes, connections, BroadcastDevice)
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
            f"coordinator: process 0 cannot listen on {host}:{port}: {error}; give an address of its machine and a "
            "port that is free and followed by a free port"
        ) from None


def _welcome(host: str, port: int, hello: dict[str, Any], deadline: float) -> dict[int, Connection]:
    """Accepts the leader's connections to all followers."""
    _listen(host, port).close()  # check JAX's port first: JAX would end the process if it is in use
    connections: dict[int, Connection] = {}
    with _listen(host, port + 1) as listener:
        while missing := [number for number in range(1, hello["num_processes"]) if number not in connections]:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                accepted, address = listener.accept()
            except TimeoutError:
                late = f"coordinator: of {hello['num_processes']} processes, {missing} did not connect in time"
                raise _refuse(connections.values(), late) from None
            connection = Connection(accepted)
            theirs = _hello(accepted, connection)
            if theirs is None:
                _LOG.warning("coordinator: %s is not a slora-jax process", address)
                connection.close()
                continue
            number = theirs.pop("process_id")
            reason = difference(hello, theirs, number)
            if reason is None and number not in missing:
                reason = f"process_id={number}: another process has this number"
            if reason is not None:
                raise _refuse([*connections.values(), connection], reason)
            connections[number] = connection
    for connection in connections.values():
        connection.send(encode("welcome", {}))
    return connections


def _hello(accepted: socket.socket, connection: Connection) -> dict[str, Any] | None:
    """Receives a follower's hello; None if the peer is not a slora-jax process."""
    accepted.settimeout(_HELLO_SECONDS)
    try:
        call = connection.receive()
    except (OSError, FrameError):
        return None
    accepted.settimeout(None)
    if call is None or call.name != "hello" or type(call.arguments.get("process_id")) is not int:
        return None
    return call.arguments


def _refuse(connections: Iterable[Connection], reason: str) -> ConfigError:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(encode("refused", {"error": reason}))
    return ConfigError(reason)


def _connect(host: str, port: int, process_id: int, hello: dict[str, Any], deadline: float) -> Connection:
    """Connects a follower to the leader, retrying until the leader listens."""
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
        raise ConfigError(f"coordinator: process 0 at {host}:{port} is still waiting for other processes") from None
    except (OSError, FrameError) as error:
        raise ConfigError(f"coordinator: no answer from process 0 at {host}:{port}: {error}") from None
    if answer is None or answer.name != "welcome":
        reason = "it closed the connection"
        if answer is not None:
            reason = answer.arguments.get("error", "it is not a slora-jax process")
        raise ConfigError(f"coordinator: refused by process 0 at {host}:{port}: {reason}")
    connected.settimeout(None)
    return connection
