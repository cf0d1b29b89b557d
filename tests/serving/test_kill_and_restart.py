"""Servers that are killed and stopped under load: what their clients see, and what the next one knows."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import ENGINE, LiveServer

from slora_jax.adapters import BaseGeometry, random_adapter, write_peft
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.models import ModelConfig

ADAPTERS = 4
TOKENS = 160
STREAMS = 24  # three times what runs at once
LONG = ENGINE | {"num_pages": 200, "max_num_seqs": 8, "max_model_len": 256, "max_lora_rank": 16, "decode_buckets": (8,)}
"""With room for answers during which something can happen."""
CLIENT = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


class Files:
    """Adapters `adapter-0` to `adapter-3` are watched; `extra` lies where clients may load from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model"
        write_checkpoint(self.model, 2, seed=0)
        for i in range(ADAPTERS):
            self._write_adapter(root / "adapters" / f"adapter-{i}", seed=i, rank=4 * (i + 1))
        self.extra = self._write_adapter(root / "elsewhere" / "extra", seed=9, rank=8)

    def server(self, name: str, drain_seconds: float) -> LiveServer:
        config = {
            "engine": LONG,
            "adapters": str(self.root / "adapters"),
            "adapter_roots": [str(self.root / "elsewhere")],
            "drain_seconds": drain_seconds,
        }
        return LiveServer(self.model, self.root / f"{name}.yaml", config)

    def _write_adapter(self, directory: Path, seed: int, rank: int) -> Path:
        model = ModelConfig.from_directory(self.model)
        geometry = BaseGeometry(
            model.num_layers, model.hidden_size, model.q_width, model.kv_width, model.intermediate_size, 8
        )
        return write_peft(directory, random_adapter(geometry, rank, ("q", "k", "v", "o"), seed=seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("restarted"))


def body(model: str, seed: int, max_tokens: int = TOKENS) -> dict[str, Any]:
    """Every other seed is greedy."""
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
    """A client that reads one answer. error: what its connection raised; refusal: the error that it was sent, by status
    or by event; is_done: [DONE] came."""

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


def until_taken(server: LiveServer, streams: Sequence[Stream]) -> None:
    """Waits until the server has taken every request: a connection that it has not accepted when it stops is reset."""
    deadline = time.monotonic() + 30
    while True:
        unfinished = server.metric("slora_running_requests") + server.metric("slora_waiting_requests")
        if unfinished + sum(stream.is_complete for stream in streams) >= STREAMS:
            return
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


def under_load(server: LiveServer, models: Sequence[str]) -> list[Stream]:
    """Streams of which some have had tokens and some wait."""
    streams = [Stream(server.url, body(models[i % len(models)], i)) for i in range(STREAMS)]
    deadline = time.monotonic() + 30
    while sum(bool(stream.tokens) for stream in streams) < 6:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.002)
    return streams


def joined(streams: Sequence[Stream], seconds: float = 30) -> Sequence[Stream]:
    """When all clients have returned: none hangs."""
    deadline = time.monotonic() + seconds
    for stream in streams:
        stream.join(max(0.0, deadline - time.monotonic()))
        assert not stream.is_alive()
    return streams


def models_of(server: LiveServer) -> set[str]:
    status, text = server.get("/v1/models")
    assert status == 200
    return {model["id"] for model in json.loads(text)["data"]}


def tokens_of(server: LiveServer, models: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """What each model answers, greedy and sampled."""
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


def test_a_killed_server_is_an_error_to_every_client_and_the_next_one_has_its_adapters(files: Files) -> None:
    there = ["base", "adapter-0", "adapter-1", "adapter-3", "extra"]
    with files.server("killed", drain_seconds=60) as server:
        extra = {"lora_name": "extra", "lora_path": str(files.extra)}
        assert server.post("/v1/load_lora_adapter", extra)[0] == 200
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "adapter-2"})[0] == 200
        assert models_of(server) == set(there)
        before = tokens_of(server, there)
        assert len(set(map(tuple, before.values()))) == len(before)  # every adapter shows

        streams = under_load(server, there)
        server.kill()
        for stream in joined(streams, seconds=10):
            assert stream.is_complete or (stream.error is not None and not stream.is_done)
        assert sum(stream.error is not None for stream in streams) >= STREAMS // 2
        assert is_refused(server.port)

    with files.server("killed", drain_seconds=60) as server:  # the next one; its log replaces the other's
        assert models_of(server) == set(there)
        status, answer = server.post("/v1/completions", body("adapter-2", 0))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert tokens_of(server, there) == before

        # SIGTERM: who is being answered is answered to the end, who comes now is refused, and the status is 0.
        with httpx.Client(base_url=server.url) as known:
            assert known.get("/ready").status_code == 200
            streams = under_load(server, there)
            until_taken(server, streams)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not is_refused(server.port):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            assert any(stream.is_alive() for stream in streams)
            late = known.post("/v1/completions", json=body("base", 0))  # on a connection from before
            assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
            assert int(late.headers["Retry-After"]) > 0
        for stream in joined(streams):
            came_too_late = isinstance(stream.error, httpx.ConnectError) or stream.status == 503
            assert stream.is_complete or came_too_late
        assert sum(stream.is_complete for stream in streams) >= STREAMS // 2  # those that waited too
        assert server.process.wait(10) == 0
        assert [stream.tokens[:12] for stream in streams[2:4]] == [before["adapter-1", 2], before["adapter-3", 3]]


def test_at_the_deadline_of_a_drain_clients_are_told_and_the_status_is_0(files: Files) -> None:
    with files.server("deadline", drain_seconds=0.1) as server:
        streams = under_load(server, ["base", "adapter-0"])
        start = time.monotonic()
        assert server.stop(signal.SIGINT, timeout=10) == 0
        assert time.monotonic() - start < 8
        joined(streams, seconds=5)
        told = [stream for stream in streams if not stream.is_complete]
        assert len(told) >= STREAMS // 2
        for stream in told:
            assert stream.error is None and stream.refusal is not None
            assert stream.status in (200, 503)
            assert stream.refusal["code"] == "stopping" and not stream.is_done
        assert {stream.status for stream in told} == {200, 503}  # some had begun, some waited


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(files: Files, number: signal.Signals) -> None:
    with files.server(f"twice-{number.name}", drain_seconds=60) as server:
        streams = under_load(server, ["base", "adapter-0"])
        server.process.send_signal(number)
        deadline = time.monotonic() + 10
        while "stopping" not in server.log:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert server.process.poll() is None
        assert server.stop(number, timeout=2) == 128 + number
        assert all(stream.error is not None for stream in joined(streams, seconds=5) if not stream.is_complete)
        assert any(stream.error is not None for stream in streams)
