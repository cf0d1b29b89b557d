"""HTTP in processes of its own: the answers of the in-process server, and each process may be lost."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import openai
import psutil
import pytest
import zmq
from live_server import ADAPTERS, ENGINE, MANAGE_KEY, SERVE_KEY, Files, LiveServer, until
from unharmed import running
from wire import CLOSED, connect, exchange, head, post, read_reply

from slora_jax.serving.http_processes.messages import Incoming, socket_of

KEYS = [
    {"name": "serving", "key": SERVE_KEY},
    {"name": "managing", "key": MANAGE_KEY, "rights": ["serve", "manage"]},
]
PROMPT = "List all users of the"
pytestmark = pytest.mark.timeout(900)  # starts of several processes on a busy machine
LONG = {"model": "adapter-2", "prompt": "a", "max_tokens": 94, "n": 32, "stream": True, "ignore_eos": True}
"""About 200 steps."""
ASKS: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {"model": "adapter-1", "prompt": PROMPT, "max_tokens": 12, "logprobs": 2, "echo": True, "seed": 1},
    ),
    ("/v1/completions", {"prompt": [PROMPT, "Two"], "n": 2, "max_tokens": 9, "temperature": 1.0, "seed": 4}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 20, "logit_bias": {"7": 2.5}, "stop": ["e"], "seed": 2}),
    ("/v1/completions", {"prompt": "x", "guided_regex": "[a-c]{8}", "max_tokens": 20, "prompt_logprobs": 1, "seed": 3}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2, "seed": 5},
    ),
    ("/v1/embeddings", {"model": "adapter-3", "input": [PROMPT, "b"]}),
    ("/tokenize", {"prompt": PROMPT}),
    ("/v1/completions", {"model": "nobody\ud800", "prompt": "x"}),
    ("/v1/completions", {"prompt": "x", "n": 128, "logit_bias": {"99999": 1}}),
    ("/v1/completions", {"prompt": "x" * 2000}),
    ("/tokenize", {"model": "nobody", "prompt": "x"}),
    ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/etc"}),
    ("/nowhere", {}),
]


def split_server(files: Files, root: Any, processes: int) -> LiveServer:
    config = {
        "engine": ENGINE | {"embeddings": True},
        "adapters": str(files.adapters),
        "adapter_roots": [str(files.uploads)],
        "state_file": str(root / "adapters.json"),
        "api_keys": KEYS,
        "http_processes": processes,
    }
    return LiveServer(files.model, root / "server.yaml", config)


@pytest.fixture(scope="module")
def split(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with two HTTP processes. The last test of the module kills it."""
    with split_server(files, tmp_path_factory.mktemp("split"), 2) as server:
        yield server


def test_many_messages_leave_turns_of_the_event_loop_to_the_connections() -> None:
    async def read(count: int) -> None:
        arrived: list[int] = []
        with socket_of(zmq.PUSH) as sender, socket_of(zmq.PULL) as receiver:
            sender.bind("inproc://many")
            receiver.connect("inproc://many")
            for number in range(count):
                sender.send(b"%d" % number)
            incoming = Incoming(receiver, lambda messages: arrived.extend(int(data) for (data,) in messages))
            incoming.read()
            assert 0 < len(arrived) < count
            while len(arrived) < count:
                await asyncio.sleep(0)
            incoming.close()
        assert arrived == list(range(count))

    asyncio.run(asyncio.wait_for(read(100), 20))


def processes_of(server: LiveServer) -> list[psutil.Process]:
    return [one for one in server.psutil().children() if "spawn_main" in " ".join(one.cmdline())]


def process_with(server: LiveServer, client: socket.socket) -> psutil.Process | None:
    """Returns the HTTP process that has accepted a connection."""
    port = client.getsockname()[1]
    for one in processes_of(server):
        if any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in one.net_connections("tcp")):
            return one
    return None


def comparable(answer: Any) -> Any:
    """Returns an answer without its id and time, and without the cached tokens: both servers have answered others."""
    answer = {key: value for key, value in answer.items() if key not in ("id", "created")}
    if "usage" in answer:
        answer["usage"] = {key: n for key, n in answer["usage"].items() if key != "prompt_tokens_details"}
    return answer


def test_answers_equal_the_in_process_servers(server: LiveServer, split: LiveServer) -> None:
    def refused(one: LiveServer) -> float:
        labels = (("reason", "model_not_found"),)
        return one.metrics(SERVE_KEY).get(("slora_requests_refused_total", labels), 0)

    completed, refused_before = 0, refused(server)
    for path, body in ASKS:
        status, expected = server.post(path, body, MANAGE_KEY)
        completed += status == 200 and path == "/v1/completions"
        found_status, found = split.post(path, body, MANAGE_KEY)
        assert (found_status, comparable(found)) == (status, comparable(expected)), path
    for path in ("/v1/models/adapter-1", "/openapi.json", "/ready", "/health", "/v1/completions"):
        assert split.get(path, SERVE_KEY)[0] == server.get(path, SERVE_KEY)[0]
    assert len(json.loads(split.get("/v1/models", SERVE_KEY)[1])["data"]) == ADAPTERS + 1
    assert split.get("/v1/models")[0] == 401 and split.post("/v1/completions", {"prompt": "x"})[0] == 401
    answers = {}
    for one in (server, split):
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key=SERVE_KEY, max_retries=0) as client:
            ask: dict[str, Any] = {
                "model": "adapter-3",
                "prompt": PROMPT,
                "max_tokens": 24,
                "temperature": 0.8,
                "seed": 3,
            }
            whole = client.completions.create(**ask)
            *parts, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
            text = "".join(part.choices[0].text for part in parts)
            assert text == whole.choices[0].text and last.usage == whole.usage
            answers[one.url] = text, last.usage
    assert answers[server.url] == answers[split.url]
    assert completed >= 4

    def counted(status: str) -> float:
        labels = (("method", "POST"), ("route", "/v1/completions"), ("status", status))
        return split.metrics(SERVE_KEY).get(("slora_http_requests_total", labels), 0)

    until(lambda: counted("200") == completed + 2, "both processes' requests are counted")
    until(lambda: counted("401") == 1, "refused ones too")
    assert 0 < refused(split) == refused(server) - refused_before


def test_killed_http_process_loses_its_own_connections_and_is_replaced(split: LiveServer) -> None:
    before = {one.pid for one in processes_of(split)}
    assert len(before) == 2
    with ExitStack() as stack:
        clients: dict[socket.socket, int] = {}
        while set(clients.values()) != before:  # the system chooses the process of each connection
            client = stack.enter_context(connect(split))
            client.sendall(post("/v1/completions", LONG, SERVE_KEY))
            assert client.recv(1, socket.MSG_PEEK)
            process = process_with(split, client)
            assert process is not None
            clients[client] = process.pid
        victim = clients[client]  # the newest stream is still under way
        psutil.Process(victim).kill()
        for client, pid in clients.items():
            received = bytearray()
            try:
                while not received.endswith(b"0\r\n\r\n") and (more := client.recv(1 << 16)):
                    received += more
            except ConnectionError:
                pass
            assert (b"data: [DONE]" in received) or pid == victim
        assert b"data: [DONE]" not in received  # of the newest
    until(lambda: running(split) == 0, "the lost requests are cancelled")
    until(lambda: len(processes_of(split)) == 2, "another process takes its place")
    assert victim not in {one.pid for one in processes_of(split)}
    for _ in range(8):
        assert split.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, SERVE_KEY)[0] == 200
    assert "another takes its place" in split.log and "Traceback" not in split.log


def test_killed_engine_fails_every_client_with_an_error(split: LiveServer) -> None:
    processes = processes_of(split)
    with connect(split) as client, connect(split) as known:
        known.sendall(head("GET", "/ready", None) + b"\r\n")
        assert read_reply(known, "GET").status == 200
        client.sendall(post("/v1/completions", LONG, SERVE_KEY))
        assert client.recv(1, socket.MSG_PEEK)
        split.process.send_signal(signal.SIGKILL)
        known.sendall(post("/v1/completions", {"prompt": "x"}, SERVE_KEY))
        late = read_reply(known)
        assert late.status == 503 and late.json["error"]["code"] == "dead" and "has ended" in late.message
        stream = read_reply(client)
        assert stream.status == 200 and b"[DONE]" not in stream.body
        assert json.loads(stream.body.split(b"data: ")[-1])["error"]["code"] == "dead"
        known.sendall(head("GET", "/health", None) + b"\r\n")
        health = read_reply(known, "GET")
        assert (health.status, health.json["status"]) == (503, "dead")
    until(lambda: not any(map(_runs, processes)), "all processes end")


def test_drain_answers_what_is_under_way(files: Files, tmp_path_factory: pytest.TempPathFactory) -> None:
    with split_server(files, tmp_path_factory.mktemp("drained"), 1) as server, connect(server) as client:
        with connect(server) as known:
            known.sendall(head("GET", "/ready", None) + b"\r\n")
            assert read_reply(known, "GET").status == 200
            client.sendall(post("/v1/completions", LONG, SERVE_KEY))
            assert client.recv(1, socket.MSG_PEEK)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: _is_refused(server), "new connections are refused")
            known.sendall(post("/v1/completions", {"prompt": "x"}, SERVE_KEY))
            late = read_reply(known)
            assert late == CLOSED or (late.status, late.json["error"]["code"]) == (503, "stopping")
        assert b"[DONE]" in read_reply(client).body
        assert server.process.wait(60) == 0 and "Traceback" not in server.log


def _is_refused(server: LiveServer) -> bool:
    try:
        return exchange(server, head("GET", "/health", None) + b"\r\n") == CLOSED
    except ConnectionError:
        return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
