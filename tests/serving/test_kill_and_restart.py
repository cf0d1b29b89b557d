"""Servers killed and stopped under load: errors that clients see, and adapters that the next server has."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, until, write_adapter
from tiny_model import TinyModel

ADAPTERS = 4
TOKENS = 120  # long enough answers for signals to arrive during them
STREAMS = 32  # twice as many as run at once
pytestmark = pytest.mark.timeout(900)  # two starts on a busy machine
CLIENT = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


class Files:
    """Adapters `adapter-0` to `adapter-3` in a watched directory, and `extra` in a root for clients."""

    def __init__(self, root: Path, tiny: TinyModel) -> None:
        self.root = root
        self.model = root / "model"
        self.model.mkdir()
        tiny.save(self.model)
        for i in range(ADAPTERS):
            write_adapter(root / "adapters" / f"adapter-{i}", tiny, seed=i, rank=4 * (i + 1))
        self.extra = write_adapter(root / "elsewhere" / "extra", tiny, seed=9)

    def server(self, name: str, drain_seconds: float) -> LiveServer:
        config = {
            "adapters": str(self.root / "adapters"),
            "adapter_roots": [str(self.root / "elsewhere")],
            "drain_seconds": drain_seconds,
        }
        return LiveServer(self.model, self.root / f"{name}.yaml", config)


@pytest.fixture(scope="module")
def files(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("restarted"), tiny)


def body(model: str, seed: int, max_tokens: int = TOKENS) -> dict[str, Any]:
    """Returns a request; even seeds are greedy."""
    return {
        "model": model,
        "prompt": [5 + seed, 6, 7],
        "max_tokens": max_tokens,
        "temperature": float(seed % 2),
        "seed": seed,
        "ignore_eos": True,
        "return_token_ids": True,
    }


class Stream(threading.Thread):
    """A client that reads one answer.

    Attributes:
      error: exception of its connection.
      refusal: error in the answer, by status or by event.
      is_done: whether [DONE] was received.
    """

    def __init__(self, url: str, request: dict[str, Any]) -> None:
        super().__init__()
        self._url, self._request = url, request
        self.status: int | None = None
        self.tokens: list[int] = []
        self.refusal: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.is_done = False
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.TransportError as error:
            self.error = error

    @property
    def is_complete(self) -> bool:
        return self.is_done and len(self.tokens) == self._request["max_tokens"] and self.error is None

    def _read(self) -> None:
        request = self._request | {"stream": True}
        with CLIENT.stream("POST", f"{self._url}/v1/completions", json=request) as answer:
            self.status = answer.status_code
            if self.status != 200:
                self.refusal = json.loads(answer.read())["error"]
                return
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.is_done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    self.refusal = event.get("error")
                    for choice in event.get("choices", ()):
                        self.tokens += choice["token_ids"]


def until_accepted(server: LiveServer, streams: Sequence[Stream]) -> None:
    """Waits until the server has accepted every request: it resets a connection that is not accepted when it stops."""

    def accepted() -> bool:
        unfinished = server.metric("slora_running_requests") + server.metric("slora_waiting_requests")
        return unfinished + sum(stream.is_complete for stream in streams) >= STREAMS

    until(accepted, "all requests are accepted")


def under_load(server: LiveServer, models: Sequence[str]) -> list[Stream]:
    """Starts streams and returns when some have had tokens and others wait."""
    streams = [Stream(server.url, body(models[i % len(models)], i)) for i in range(STREAMS)]
    until(lambda: sum(bool(stream.tokens) for stream in streams) >= 6, "tokens of six streams")
    return streams


def joined(streams: Sequence[Stream]) -> Sequence[Stream]:
    """Waits for all clients; none may hang."""
    until(lambda: not any(stream.is_alive() for stream in streams), "all clients have returned")
    return streams


def models_of(server: LiveServer) -> set[str]:
    status, text = server.get("/v1/models")
    assert status == 200
    return {model["id"] for model in json.loads(text)["data"]}


def tokens_of(server: LiveServer, models: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """Returns the tokens that each model answers, greedy and sampled."""
    answers = {}
    for model in models:
        for seed in (2, 3):
            status, answer = server.post("/v1/completions", body(model, seed, max_tokens=12))
            assert status == 200, answer
            answers[model, seed] = answer["choices"][0]["token_ids"]
    return answers


def is_refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_killed_server_fails_its_clients_and_the_next_one_has_its_adapters(files: Files) -> None:
    present = ["base", "adapter-0", "adapter-1", "adapter-3", "extra"]
    with files.server("killed", drain_seconds=600) as server:
        extra = {"lora_name": "extra", "lora_path": str(files.extra)}
        assert server.post("/v1/load_lora_adapter", extra)[0] == 200
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "adapter-2"})[0] == 200
        assert models_of(server) == set(present)
        before = tokens_of(server, present)
        assert len(set(map(tuple, before.values()))) == len(before)  # every adapter changes the answer

        streams = under_load(server, present)
        server.kill()
        for stream in joined(streams):
            assert stream.is_complete or (stream.error is not None and not stream.is_done)
        assert sum(stream.error is not None for stream in streams) >= STREAMS // 2
        assert is_refused(server.port)

    with files.server("killed", drain_seconds=600) as server:  # its log replaces the first one's
        assert models_of(server) == set(present)
        status, answer = server.post("/v1/completions", body("adapter-2", 0))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert tokens_of(server, present) == before

        # SIGTERM: requests under way are answered to the end, new ones are refused, and the status is 0.
        with httpx.Client(base_url=server.url) as known:
            assert known.get("/ready").status_code == 200
            streams = under_load(server, present)
            until_accepted(server, streams)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: is_refused(server.port), "new connections are refused")
            assert any(stream.is_alive() for stream in streams)
            late = known.post("/v1/completions", json=body("base", 0))  # on an open connection
            assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
            assert int(late.headers["Retry-After"]) > 0
        for stream in joined(streams):
            came_too_late = isinstance(stream.error, httpx.ConnectError) or stream.status == 503
            assert stream.is_complete or came_too_late
        assert sum(stream.is_complete for stream in streams) >= STREAMS // 2  # waiting ones too
        assert server.process.wait(60) == 0
        assert [stream.tokens[:12] for stream in streams[2:4]] == [before["adapter-1", 2], before["adapter-3", 3]]


def test_drain_deadline_fails_requests_with_an_error_and_status_0(files: Files) -> None:
    with files.server("deadline", drain_seconds=0.1) as server:
        streams = under_load(server, ["base", "adapter-0"])
        until_accepted(server, streams)
        assert server.stop(signal.SIGINT) == 0
        failed = [stream for stream in joined(streams) if not stream.is_complete]
        assert len(failed) >= STREAMS // 2
        for stream in failed:
            assert stream.error is None and stream.refusal is not None
            assert stream.refusal["code"] == "stopping" and not stream.is_done
        assert {stream.status for stream in failed} == {200, 503}  # some had begun, some waited


def test_second_signal_ends_at_once(files: Files) -> None:
    with files.server("twice", drain_seconds=600) as server:
        streams = under_load(server, ["base", "adapter-0"])
        until_accepted(server, streams)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in server.log, "the first signal is handled")
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
        assert all(stream.error is not None for stream in joined(streams) if not stream.is_complete)
        assert any(stream.error is not None for stream in streams)
