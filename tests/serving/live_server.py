"""Starts `slora serve` in its own process, as users do, with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families
from tiny_model import MEDIUM, PAGE_SIZE, SHARED_PROGRAMS, TinyModel

from slora_jax import EngineConfig
from slora_jax.adapters import random_adapter, write_peft

ENGINE = {
    "dtype": "float32",
    "page_size": PAGE_SIZE,
    **MEDIUM,
    "progress": False,
}
"""An engine shape that other tests compile too."""
START_SECONDS = 240

RESPONSE_TEMPLATE = {
    "start_anchor": "assistant: ",
    "fields": {
        "content": {"close": "</s>"},
        "tool_calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
    },
}
"""How the model declares its tool calls."""
SERVE_KEY, MANAGE_KEY = "sk-serve", "sk-manage"
ADAPTERS = 12


@dataclass(frozen=True)
class Files:
    """Directories: a model with a chat template, adapters adapter-0 to adapter-11, and an empty root for uploads."""

    model: Path
    adapters: Path
    uploads: Path


def engine_config() -> EngineConfig:
    return EngineConfig(**ENGINE)  # type: ignore[arg-type]


def write_adapter(directory: Path, tiny: TinyModel, seed: int, rank: int = 8) -> Path:
    return write_peft(directory, random_adapter(tiny.geometry, rank, ("q", "k", "v", "o"), seed=seed))


def until(condition: Callable[[], object], what: str = "", seconds: float = 60) -> None:
    """Polls a condition. The limit only bounds a test that hangs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


class LiveServer:
    """A server process. Requests are accepted once `wait_ready` has returned."""

    def __init__(self, model_dir: Path, config_file: Path, config: dict[str, Any], *, arguments: tuple = ()) -> None:
        config_file.write_text(json.dumps({"engine": ENGINE, "name": "base"} | config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_file = config_file.with_suffix(".log")
        command = [sys.executable, "-c", "from slora_jax.cli import main; raise SystemExit(main())", "serve"]
        command += [str(model_dir), "--config", str(config_file), "--port", str(self.port), *arguments]
        with self._log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | SHARED_PROGRAMS
            )

    def __enter__(self) -> Self:
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        return self._log_file.read_text()

    def wait_ready(self) -> Self:
        try:
            until(self._is_ready, "the server is ready", START_SECONDS)
        except AssertionError:
            self.kill()
            raise
        return self

    def get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        return self._send(urllib.request.Request(self.url + path), key)

    def post(self, path: str, body: object, key: str | None = None) -> tuple[int, Any]:
        """Posts an object as JSON, or bytes unchanged. The answer is parsed."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        status, answer = self._send(request, key)
        return status, json.loads(answer)

    def metrics(self, key: str | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Returns values by name and labels, such as `("slora_pool_pages", (("kind", "kv"),))`."""
        status, text = self.get("/metrics", key)
        assert status == 200, text
        families = text_string_to_metric_families(text.decode())
        return {
            (one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples
        }

    def metric(self, name: str, key: str | None = None, **labels: str) -> float:
        return self.metrics(key)[name, tuple(sorted(labels.items()))]

    def psutil(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        """Sends a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def _send(self, request: urllib.request.Request, key: str | None) -> tuple[int, bytes]:
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
