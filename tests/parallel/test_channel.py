"""Frames arrive unchanged and in order; anything else is refused."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from slora_jax.distributed.channel import MAX_BODY, MAX_HEADER, Connection, FrameError, encode


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection]]:
    """Returns a socket and the connection at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    other.settimeout(10)
    connection = Connection(other)
    yield one, connection
    one.close()
    connection.close()


def frame(content: object, body: bytes = b"", **lengths: int) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    prefix = struct.pack("<4sIQ", b"SLRA", lengths.get("header_size", len(text)), lengths.get("body_size", len(body)))
    return prefix + text + body


def test_calls_arrive_in_order_with_their_arguments_and_arrays(ends, rng) -> None:
    one, connection = ends
    arrays = [
        rng.integers(-5, 5, (3, 4)).astype(np.int32),
        rng.standard_normal((2, 0, 3)).astype(np.float32),
        np.float32(rng.standard_normal((5, 6)))[:, ::2],  # not contiguous
        rng.standard_normal((2, 3, 2)).astype(ml_dtypes.bfloat16),
        np.array(7, np.int32),
    ]
    calls = [("step", {"key": [1, 0], "after": ["sample"]}, arrays), ("stop", {}, []), ("move", {}, arrays[:1])]
    sender = threading.Thread(target=lambda: [one.sendall(bytes([b])) for b in b"".join(encode(*c) for c in calls)])
    sender.start()  # byte by byte
    for name, arguments, sent in calls:
        call = connection.receive()
        assert (call.name, call.arguments, len(call.arrays)) == (name, arguments, len(sent))
        for array, expected in zip(call.arrays, sent, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    sender.join()
    one.close()
    assert connection.receive() is None


def test_frames_of_many_threads_do_not_mix(ends) -> None:
    one, connection = ends
    arrays = [np.full(50_000, number, np.int32) for number in range(4)]
    ours = Connection(one)
    threads = [
        threading.Thread(target=lambda a=a: [ours.send(encode("part", {}, [a])) for _ in range(10)]) for a in arrays
    ]
    for thread in threads:
        thread.start()
    seen = [connection.receive().arrays[0] for _ in range(40)]
    for thread in threads:
        thread.join()
    assert sorted(int(array[0]) for array in seen) == sorted(list(range(4)) * 10)
    assert all((array == array[0]).all() for array in seen)


HOSTILE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(20),
    "no JSON": frame(b"{not json"),
    "not UTF-8": frame(b"\xff\xfe\xff"),
    "no list": frame({"name": "step"}),
    "no name": frame([1, {}, []]),
    "no arguments": frame(["step", [], []]),
    "object array": frame(["step", {}, [["object", [1]]]], bytes(8)),
    "unknown dtype": frame(["step", {}, [["float64", [1]]]], bytes(8)),
    "negative shape": frame(["step", {}, [["int32", [-1, -2]]]], bytes(8)),
    "fractional shape": frame(["step", {}, [["int32", [0.5]]]], bytes(2)),
    "shape of words": frame(["step", {}, [["int32", "ab"]]], bytes(2)),
    "boolean shape": frame(["step", {}, [["int32", [True]]]], bytes(4)),
    "many axes": frame(["step", {}, [["int32", [1] * 100]]], bytes(4)),
    "huge empty": frame(["step", {}, [["int32", [0, 1 << 70]]]]),
    "body too short": frame(["step", {}, [["int32", [3]]]], bytes(8)),
    "body too long": frame(["step", {}, [["int32", [1]]]], bytes(8)),
    "deep": frame(b"[" * 100_000),
    "header beyond the limit": frame([], header_size=MAX_HEADER + 1),
    "body beyond the limit": frame([], body_size=MAX_BODY + 1),
    "cut in the prefix": frame(["stop", {}, []])[:7],
    "cut in the header": frame(["stop", {}, []])[:20],
    "cut in the body": frame(["move", {}, [["int32", [100]]]], bytes(400))[:-1],
}


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE)
def test_invalid_frame_is_refused(ends, sent) -> None:
    one, connection = ends
    one.sendall(sent)
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(FrameError):
        connection.receive()


def test_reset_connection_is_an_error_for_sender_and_receiver(ends) -> None:
    one, connection = ends
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, as when the process is killed
    one.close()
    with pytest.raises(OSError):
        connection.receive()
    with pytest.raises(OSError):
        for _ in range(10):
            connection.send(encode("move", {}, [np.zeros(100_000, np.int32)]))


def test_send_with_a_timeout_does_not_wait_for_another_threads_frame(ends) -> None:
    _, connection = ends
    big = encode("part", {}, [np.zeros(1 << 24, np.int32)])  # more than the socket buffers hold
    with ThreadPoolExecutor(1) as executor:
        stuck = executor.submit(connection.send, big)
        while not connection._sending.locked():
            pass
        assert not connection.send(encode("lost", {}), timeout=0.1)
        connection.close()
        assert isinstance(stuck.exception(), OSError)
