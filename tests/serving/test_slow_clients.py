"""Clients that are slow, silent, or gone: what they hold is given back in time, and others do not notice."""

from __future__ import annotations

import json
import resource
import socket
import time
from contextlib import ExitStack

import pytest
from live_server import MANAGE_KEY, SERVE_KEY, LiveServer
from unharmed import Before, running, until
from wire import CLOSED, connect, exchange, head, post, read_replies, read_reply

COMPLETIONS = "/v1/completions"
SECONDS = 2.0
"""The server's deadlines: for a head, for a body, for an answer to be taken."""
SLACK = 4.0
"""On a busy machine."""
LONG = {"model": "adapter-2", "prompt": "a", "max_tokens": 94, "ignore_eos": True, "temperature": 1.0}
MANY = LONG | {"n": 64}
"""64 sequences, 16 at a time: some 400 steps."""


pytestmark = pytest.mark.usefixtures("unharmed")


def is_closed(client: socket.socket) -> bool:
    """Whether the other side has closed; what it sent before is thrown away."""
    client.setblocking(False)
    try:
        while client.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def received(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = bytearray()
    try:
        while more := client.recv(1 << 16):
            data += more
    except ConnectionError:
        pass
    return bytes(data)


def cancelled(server: LiveServer) -> float:
    return server.metric("slora_requests_total", MANAGE_KEY, finish_reason="cancelled")


def start(server: LiveServer, body: dict, **options: int) -> socket.socket:
    """Sends a request and returns when it runs."""
    client = connect(server, **options)
    client.sendall(post(COMPLETIONS, body, SERVE_KEY))
    until(lambda: running(server) > 0, 10, "the request runs")
    return client


@pytest.mark.parametrize("first", [b"", b"\r\n", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A"])
def test_a_head_that_comes_a_byte_at_a_time_is_cut_off(server: LiveServer, first: bytes) -> None:
    with connect(server) as client:
        begin = time.monotonic()
        client.sendall(first)
        try:
            while time.monotonic() - begin < SECONDS + SLACK and not is_closed(client):
                time.sleep(0.1)
                client.setblocking(True)
                client.sendall(b"\n" if first == b"\r\n" else b"a" if first else b"")
        except ConnectionError:
            pass
        assert SECONDS * 0.9 < time.monotonic() - begin < SECONDS + SLACK


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_comes_a_byte_at_a_time_is_408(server: LiveServer, chunked: bool) -> None:
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100000"
    with connect(server) as client:
        client.sendall(head("POST", COMPLETIONS, SERVE_KEY, length, "Content-Type: application/json") + b"\r\n")
        client.settimeout(0.1)
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS + SLACK:
            try:
                client.sendall(b"1\r\n \r\n" if chunked else b" ")
                client.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                continue
        client.settimeout(5)
        reply = read_reply(client)
        assert reply.status == 408 and "limits.body_seconds" in reply.message
        assert reply.headers["connection"] == "close" and read_reply(client) == CLOSED


def test_a_refused_body_that_never_ends_is_cut_off(server: LiveServer) -> None:
    fields = ("Content-Length: 99999999999", "Content-Type: application/json")
    with connect(server) as client:
        client.sendall(head("POST", COMPLETIONS, SERVE_KEY, *fields) + b"\r\n")
        assert read_reply(client).status == 413
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - begin < SECONDS + SLACK:
                client.sendall(b"x" * 1000)
                time.sleep(0.05)


def test_a_head_behind_a_stream_is_bounded_too(server: LiveServer) -> None:
    """The answer to the first request is not complete while megabytes of the second one's head come."""
    memory = server.psutil().memory_info().rss
    with start(server, MANY | {"stream": True}) as client:
        with pytest.raises(ConnectionError):
            client.sendall(head("GET", "/health", None) + b"X: ")
            for _ in range(64):
                client.sendall(b"x" * (1 << 20))
        assert server.psutil().memory_info().rss - memory < 32 << 20
    until(lambda: running(server) == 0, SLACK, "the stream was cancelled")


def test_requests_behind_a_stream_are_bounded_too(server: LiveServer) -> None:
    memory = server.psutil().memory_info().rss
    with start(server, MANY | {"stream": True}) as client:
        with pytest.raises(ConnectionError):
            for _ in range(400):
                client.sendall((head("GET", "/health", None) + b"\r\n") * 2000)
        assert server.psutil().memory_info().rss - memory < 64 << 20
    until(lambda: running(server) == 0, SLACK, "the stream was cancelled")


def test_a_few_requests_in_a_row_are_answered_in_order(server: LiveServer) -> None:
    with connect(server) as client:
        asks = [post(COMPLETIONS, {"prompt": "x", "max_tokens": n, "ignore_eos": True}, SERVE_KEY) for n in (5, 1, 3)]
        client.sendall(b"".join(asks) + head("GET", "/health", None) + b"\r\n")
        *answers, health = read_replies(client, 4)
        assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [5, 1, 3]
        assert health.json == {"status": "ready", "error": None}


def test_a_client_that_leaves_with_requests_in_a_row_is_cancelled(server: LiveServer) -> None:
    """The one under way, too, though another came after it."""
    before = cancelled(server)
    for _ in range(2):
        with start(server, MANY) as client:
            client.sendall(post(COMPLETIONS, MANY, SERVE_KEY) + head("GET", "/health", None) + b"\r\n")
            time.sleep(0.05)
        until(lambda: running(server) == 0, SLACK, "it was cancelled")
    assert cancelled(server) - before > 64


def test_a_client_that_never_reads_a_stream_is_cancelled(server: LiveServer) -> None:
    """Its answer is larger than what the system takes for it."""
    body = MANY | {"n": 128, "stream": True, "logprobs": 20}
    with start(server, body, receive_buffer=4096) as client:
        port = client.getsockname()[1]
        until(lambda: not holds(server, port), 60, "the server has given it up")
        until(lambda: running(server) == 0, SLACK, "all of it was cancelled")
        assert b"[DONE]" not in received(client)


def holds(server: LiveServer, port: int) -> bool:
    """Whether the server has a connection to this port of a client."""
    return any(one.raddr and one.raddr.port == port for one in server.psutil().net_connections("tcp"))


def test_a_client_that_reads_slowly_gets_all(server: LiveServer) -> None:
    body = LONG | {"n": 8, "stream": True, "logprobs": 20}
    with connect(server, receive_buffer=4096) as client:
        client.sendall(post(COMPLETIONS, body, SERVE_KEY))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += client.recv(4096)
            time.sleep(0.001)
    assert data.count(b'"finish_reason":"length"') == 8 and b"[DONE]" in data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_a_client_that_goes_away_is_cancelled(server: LiveServer, stream: bool, how: str) -> None:
    before = cancelled(server)
    with start(server, MANY | {"stream": stream}) as client:
        if stream:
            client.recv(100)
        match how:
            case "close":
                client.close()
            case "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                client.close()
            case "half":
                client.shutdown(socket.SHUT_WR)
        until(lambda: running(server) == 0, SLACK, "it was cancelled")
        assert cancelled(server) - before > 0


def test_clients_that_go_away_at_any_moment(server: LiveServer, unharmed: Before) -> None:
    """In the midst of a head, of a body, before the first token and after it."""
    data = post(COMPLETIONS, LONG | {"stream": True}, SERVE_KEY)
    ends = [*range(0, len(data), 17), *[len(data)] * 20]
    for i, end in enumerate(ends):
        with connect(server) as client:
            client.sendall(data[:end])
            if end == len(data):
                time.sleep(0.003 * (i % 20))
    until(lambda: running(server) == 0, 10, "all were cancelled")
    unharmed.check_answers(server)


def test_clients_that_go_away_while_an_adapter_comes_and_goes(server: LiveServer, files) -> None:
    load = {"lora_name": "fleeting", "lora_path": str(files.adapters / "adapter-1")}
    for _ in range(3):
        for path, body in (("/v1/load_lora_adapter", load), ("/v1/unload_lora_adapter", {"lora_name": "fleeting"})):
            with connect(server) as client:
                client.sendall(post(path, body, MANAGE_KEY))
            path, status = "/v1/models/fleeting", 200 if "lora_path" in body else 404
            until(
                lambda path=path, status=status: server.get(path, SERVE_KEY)[0] == status, 10, "it is done all the same"
            )


def test_unloads_that_wait_for_long_do_not_hold_up_anybody(server: LiveServer, files, unharmed: Before) -> None:
    """Each waits for a stream that uses its adapter."""
    with ExitStack() as stack:
        waiting = []
        for i in range(8):
            load = {"lora_name": f"waiting-{i}", "lora_path": str(files.adapters / f"adapter-{i}")}
            assert (
                exchange(server, post("/v1/load_lora_adapter", load | {"load_inplace": True}, MANAGE_KEY)).status == 200
            )
        streams = []
        for i in range(8):
            client = stack.enter_context(connect(server))
            client.sendall(post(COMPLETIONS, LONG | {"model": f"waiting-{i}", "n": 16, "stream": True}, SERVE_KEY))
            streams.append(client)
        until(lambda: running(server) > 100, 10, "they run")
        for i in range(8):
            waiting.append(stack.enter_context(connect(server)))
            body = {"lora_name": f"waiting-{i}", "drain_seconds": 3600}
            waiting[-1].sendall(post("/v1/unload_lora_adapter", body, MANAGE_KEY))
        unharmed.check_answers(server)
        for client in streams:
            client.close()
        for client in waiting:
            assert read_reply(client).status == 200


def test_thousands_of_half_open_connections(server: LiveServer, unharmed: Before) -> None:
    """2,000 that send half a head leave room for good requests; beyond limits.connections, they are closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    clients = []
    try:
        for _ in range(2000):
            clients.append(connect(server))
            clients[-1].sendall(b"GET /health HTTP/1.1\r\nX: ")
        begin = time.monotonic()
        unharmed.check_answers(server)
        assert time.monotonic() - begin < SLACK
        for _ in range(400):
            clients.append(connect(server))
        until(lambda: sum(map(is_closed, clients[2000:])) >= 300, SLACK, "those beyond the limit are closed")
        until(lambda: all(map(is_closed, clients)), SECONDS + 2 * SLACK, "all are closed at their deadline")
        unharmed.check_answers(server)
        until(lambda: server.psutil().num_fds() <= unharmed.files + 8, SLACK, "file handles are given back")
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_may_ask_again(server: LiveServer) -> None:
    """The deadlines are for requests that have begun."""
    with connect(server) as client:
        for _ in range(2):
            client.sendall(head("GET", "/health", None) + b"\r\n")
            assert read_reply(client, "GET").status == 200
            time.sleep(SECONDS + 0.5)
        client.sendall(post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, SERVE_KEY))
        assert json.loads(read_reply(client).body)["usage"]["completion_tokens"] == 1
