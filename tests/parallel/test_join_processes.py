"""How processes join, and the errors if they cannot."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_processes import free_port

from slora_jax import ConfigError, join_processes
from slora_jax.distributed.channel import Connection, encode
from slora_jax.distributed.join import _connect, _welcome

HELLO = {"num_processes": 3, "jax": "1.0", "slora-jax": "0.1"}


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "coordinator='localhost': must be HOST:PORT"),
        ((":1234", 2, 0), "must be HOST:PORT"),
        (("host:65535", 2, 0), "PORT in 1..65534"),
        (("host:1234", 1, 0), "num_processes=1: must be at least 2"),
        (("host:1234", 2, 2), "process_id=2: must be in 0..1"),
        (("host:1234", 2, -1), "process_id=-1: must be in 0..1"),
    ],
)
def test_arguments_are_checked(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        join_processes(*arguments)


def test_processes_join_in_any_order_and_other_clients_are_refused(port, threads) -> None:
    late = threads.submit(_connect, "127.0.0.1", port + 1, 2, HELLO, soon())  # before there is a leader
    time.sleep(0.3)
    leader = threads.submit(_welcome, "127.0.0.1", port, HELLO, soon())
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port + 1))
            break
        except OSError:
            time.sleep(0.01)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    other = threads.submit(_connect, "127.0.0.1", port + 1, 1, HELLO, soon())
    connections = leader.result(20)
    assert sorted(connections) == [1, 2]
    for number, follower in ((1, other.result(20)), (2, late.result(20))):
        follower.send(encode("ready", {"process": number}))
        assert connections[number].receive().arguments == {"process": number}
    stranger.close()


def test_port_in_use_is_named(port) -> None:
    for taken in (port, port + 1):
        message = f"cannot listen on 127.0.0.1:{taken}.*a port that is free"
        with socket.create_server(("127.0.0.1", taken)), pytest.raises(ConfigError, match=message):
            join_processes(f"127.0.0.1:{port}", 2, 0, timeout=5)


def test_missing_process_is_named(port, threads) -> None:
    follower = threads.submit(_connect, "127.0.0.1", port + 1, 1, HELLO, soon())
    with pytest.raises(ConfigError, match=r"of 3 processes, \[2\] did not connect in time"):
        _welcome("127.0.0.1", port, HELLO, soon(1.5))
    with pytest.raises(ConfigError, match=r"refused by process 0 .*\[2\] did not connect in time"):
        follower.result(20)


def test_unreachable_leader_is_named(port) -> None:
    with pytest.raises(ConfigError, match=f"process 0 cannot be reached at 127.0.0.1:{port + 1}"):
        join_processes(f"127.0.0.1:{port}", 2, 1, timeout=0.5)


@pytest.mark.parametrize(
    ("hello", "number", "message"),
    [
        (HELLO | {"jax": "2.0"}, 1, "jax: process 0 has '1.0', process 1 has '2.0'"),
        (HELLO | {"num_processes": 4}, 1, "num_processes: process 0 has 3, process 1 has 4"),
        (HELLO, 3, "process_id=3: another process has this number"),
        (HELLO, 0, "process_id=0: another process has this number"),
    ],
)
def test_incompatible_processes_are_refused_on_both_sides(port, threads, hello, number, message) -> None:
    leader = threads.submit(_welcome, "127.0.0.1", port, HELLO, soon())
    with pytest.raises(ConfigError, match=f"refused by process 0 .*{message}"):
        _connect("127.0.0.1", port + 1, number, hello, soon())
    with pytest.raises(ConfigError, match=message):
        leader.result(20)


def test_another_server_at_the_leaders_port_is_refused(port) -> None:
    def answer(listener: socket.socket) -> None:
        connection = Connection(listener.accept()[0])
        connection.receive()
        connection.send(encode("stop", {}))

    with socket.create_server(("127.0.0.1", port + 1)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with pytest.raises(ConfigError, match="it is not a slora-jax process"):
            _connect("127.0.0.1", port + 1, 1, HELLO, soon())
        thread.join()
