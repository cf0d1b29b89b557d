"""Slow, silent and disconnected clients: the server releases what they hold, and other clients are not affected."""

from __future__ import annotations

import json
import resource
import socket
import time
from contextlib import ExitStack

import pytest
from live_server import MANAGE_KEY, SERVE_KEY, LiveServer, until
from unharmed import Before, running
from wire import CLOSED, connect, exchange, head, post, read_replies, read_reply

COMPLETIONS = "/v1/completions"
SECONDS = 2.0
"""The server's deadlines for a head, a body, and reading an answer. Tests bound times from below only."""
LONG = {"model": "adapter-2", "prompt": "a", "max_tokens": 94, "ignore_eos": True, "temperature": 1.0}
MANY = LONG | {"n": 64}
"""64 sequences, 16 at a time: about 400 steps."""

pytestmark = pytest.mark.usefixtures("unharmed")


def is_closed(client: socket.socket) -> bool:
    """Returns whether the other side has closed; discards data that it sent before."""
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
    """Reads until the other side closes."""
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
    """Sends a request and returns its connection once it runs."""
    client = connect(server, **options)
    client.sendall(post(COMPLETIONS, body, SERVE_KEY))
    until(lambda: running(server) > 0, "the request runs")
    return client


def test_head_sent_byte_by_byte_is_cut_off(server: LiveServer) -> None:
    firsts = (b"", b"\r\n", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A")
    with ExitStack() as stack:
        begin = time.monotonic()
        clients = {stack.enter_context(connect(server)): first for first in firsts}
        for client, first in clients.items():
            client.sendall(first)

        def drip() -> bool:
            for client, first in list(clients.items()):
                if is_closed(client):
                    del clients[client]
                    continue
                try:
                    client.setblocking(True)
                    client.sendall(b"\n" if first == b"\r\n" else b"a" if first else b"")
                except ConnectionError:
                    del clients[client]
            time.sleep(0.1)
            return len(clients) < len(firsts)

        until(drip, "a connection is closed")
        assert time.monotonic() - begin > SECONDS * 0.9
        until(lambda: drip() and not clients, "all are closed")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_sent_byte_by_byte_is_408(server: LiveServer, chunked: bool) -> None:
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100000"
    with connect(server) as client:
        client.sendall(head("POST", COMPLETIONS, SERVE_KEY, length, "Content-Type: application/json") + b"\r\n")
        client.settimeout(0.1)

        def has_answer() -> bool:
            client.sendall(b"1\r\n \r\n" if chunked else b" ")
            try:
                return bool(client.recv(1, socket.MSG_PEEK))
            except TimeoutError:
                return False

        until(has_answer, "the server answers")
        client.settimeout(30)
        reply = read_reply(client)
        assert reply.status == 408 and "limits.body_seconds" in reply.message
        assert reply.headers["connection"] == "close" and read_reply(client) == CLOSED


def test_endless_refused_body_is_cut_off(server: LiveServer) -> None:
    fields = ("Content-Length: 99999999999", "Content-Type: application/json")
    with connect(server) as client:
        client.sendall(head("POST", COMPLETIONS, SERVE_KEY, *fields) + b"\r\n")
        assert read_reply(client).status == 413
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"x" * 1000)
                time.sleep(0.05)


def test_pipelined_head_is_bounded(server: LiveServer) -> None:
    """Megabytes of it arrive while the first request's answer is incomplete."""
    memory = server.psutil().memory_info().rss
    with start(server, MANY | {"stream": True}) as client:
        with pytest.raises(ConnectionError):
            client.sendall(head("GET", "/health", None) + b"X: ")
            for _ in range(64):
                client.sendall(b"x" * (1 << 20))
        assert server.psutil().memory_info().rss - memory < 32 << 20
    until(lambda: running(server) == 0, "the stream was cancelled")


def test_pipelined_requests_are_bounded(server: LiveServer) -> None:
    memory = server.psutil().memory_info().rss
    with start(server, MANY | {"stream": True}) as client:
        with pytest.raises(ConnectionError):
            for _ in range(400):
                client.sendall((head("GET", "/health", None) + b"\r\n") * 2000)
        assert server.psutil().memory_info().rss - memory < 64 << 20
    until(lambda: running(server) == 0, "the stream was cancelled")


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    with connect(server) as client:
        asks = [post(COMPLETIONS, {"prompt": "x", "max_tokens": n, "ignore_eos": True}, SERVE_KEY) for n in (5, 1, 3)]
        client.sendall(b"".join(asks) + head("GET", "/health", None) + b"\r\n")
        *answers, health = read_replies(client, 4)
        assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [5, 1, 3]
        assert health.json == {"status": "ready", "error": None}


def test_pipelined_requests_are_cancelled_at_a_disconnect(server: LiveServer) -> None:
    """The running one too."""
    before = cancelled(server)
    for _ in range(2):
        with start(server, MANY) as client:
            client.sendall(post(COMPLETIONS, MANY, SERVE_KEY) + head("GET", "/health", None) + b"\r\n")
            time.sleep(0.05)
        until(lambda: running(server) == 0, "it was cancelled")
    assert cancelled(server) - before > 64


def test_client_that_never_reads_a_stream_is_cancelled(server: LiveServer) -> None:
    """Its answer exceeds the socket's buffers."""
    body = MANY | {"n": 128, "stream": True, "logprobs": 20}
    with start(server, body, receive_buffer=4096) as client:
        port = client.getsockname()[1]
        until(lambda: not holds(server, port), "the server has closed the connection")
        until(lambda: running(server) == 0, "all of it was cancelled")
        assert b"[DONE]" not in received(client)


def holds(server: LiveServer, port: int) -> bool:
    """Returns whether the server has a connection to a client's port."""
    return any(one.raddr and one.raddr.port == port for one in server.psutil().net_connections("tcp"))


def test_client_that_reads_slowly_gets_all(server: LiveServer) -> None:
    body = LONG | {"n": 8, "stream": True, "logprobs": 20}
    with connect(server, receive_buffer=4096) as client:
        client.sendall(post(COMPLETIONS, body, SERVE_KEY))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += client.recv(4096)
            time.sleep(0.001)
    assert data.count(b'"finish_reason":"length"') == 8 and b"[DONE]" in data


@pytest.mark.parametrize(("how", "stream"), [("close", False), ("close", True), ("reset", True), ("half", False)])
def test_disconnected_client_is_cancelled(server: LiveServer, stream: bool, how: str) -> None:
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
        until(lambda: running(server) == 0, "it was cancelled")
        assert cancelled(server) - before > 0


def test_disconnects_at_any_moment_are_harmless(server: LiveServer, unharmed: Before) -> None:
    """Within a head, within a body, before the first token and after it."""
    data = post(COMPLETIONS, LONG | {"stream": True}, SERVE_KEY)
    ends = [*range(0, len(data), 17), *[len(data)] * 20]
    for i, end in enumerate(ends):
        with connect(server) as client:
            client.sendall(data[:end])
            if end == len(data):
                time.sleep(0.003 * (i % 20))
    until(lambda: running(server) == 0, "all were cancelled")
    unharmed.check_answers(server)


def test_disconnect_during_a_load_or_unload_does_not_stop_it(server: LiveServer, files) -> None:
    load = {"lora_name": "fleeting", "lora_path": str(files.adapters / "adapter-1")}
    for _ in range(3):
        for path, body in (("/v1/load_lora_adapter", load), ("/v1/unload_lora_adapter", {"lora_name": "fleeting"})):
            with connect(server) as client:
                client.sendall(post(path, body, MANAGE_KEY))
            status = 200 if "lora_path" in body else 404
            until(lambda status=status: server.get("/v1/models/fleeting", SERVE_KEY)[0] == status, "it is done anyway")


def test_waiting_unloads_do_not_delay_other_requests(server: LiveServer, files, unharmed: Before) -> None:
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
        until(lambda: running(server) > 100, "the streams run")
        for i in range(8):
            waiting.append(stack.enter_context(connect(server)))
            body = {"lora_name": f"waiting-{i}", "drain_seconds": 3600}
            waiting[-1].sendall(post("/v1/unload_lora_adapter", body, MANAGE_KEY))
        unharmed.check_answers(server)
        for client in streams:
            client.close()
        for client in waiting:
            assert read_reply(client).status == 200


def test_thousands_of_half_open_connections_leave_room(server: LiveServer, unharmed: Before) -> None:
    """2,000 connections with half a head leave room for other requests; those beyond limits.connections are closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    clients = []
    try:
        for _ in range(2000):
            clients.append(connect(server))
            clients[-1].sendall(b"GET /health HTTP/1.1\r\nX: ")
        unharmed.check_answers(server)
        for _ in range(400):
            clients.append(connect(server))
        until(lambda: sum(map(is_closed, clients[2000:])) >= 300, "connections beyond the limit are closed")
        until(lambda: all(map(is_closed, clients)), "all are closed at their deadline")
        unharmed.check_answers(server)
        until(lambda: server.psutil().num_fds() <= unharmed.files + 8, "files are closed")
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connection_may_be_used_again(server: LiveServer) -> None:
    """The deadlines apply to requests that have begun."""
    with connect(server) as client:
        for _ in range(2):
            client.sendall(head("GET", "/health", None) + b"\r\n")
            assert read_reply(client, "GET").status == 200
            time.sleep(SECONDS + 0.5)
        client.sendall(post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, SERVE_KEY))
        assert json.loads(read_reply(client).body)["usage"]["completion_tokens"] == 1
