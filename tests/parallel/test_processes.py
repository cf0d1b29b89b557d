"""Two processes on loopback give the tokens of one device. When one is killed or fails, all end with the reason."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import serve_together

from slora_jax import Engine, EngineConfig, SamplingParams, cli
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.distributed.group import EXIT_LOST
from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig

SECONDS_TO_END = 20


class Processes:
    """Processes of one command each, and their output."""

    def __init__(self, directory: Path, commands: list[list[str]]) -> None:
        root = Path(serve_together.__file__).parents[2]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._files = [[directory / f"{name}-{i}" for name in ("out", "errors")] for i in range(len(commands))]
        self.processes = [
            subprocess.Popen([sys.executable, *command], env=environment, stdout=out.open("w"), stderr=errors.open("w"))
            for command, (out, errors) in zip(commands, self._files, strict=True)
        ]

    def statuses(self, timeout: float) -> list[int]:
        """Waits for all processes, at most `timeout` seconds. Returns their exit statuses."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def out(self, process: int) -> str:
        return self._files[process][0].read_text()

    def errors(self, process: int) -> str:
        return self._files[process][1].read_text()

    def served(self) -> dict:
        """Waits until the leader has served its traffic. Returns its report."""
        leader = self.processes[0]
        while True:
            ended = leader.poll() is not None
            lines = [line for line in self.out(0).splitlines(keepends=True) if line.startswith("{")]
            if lines and lines[0].endswith("\n"):
                return json.loads(lines[0])
            assert not ended, "\n".join(self.errors(i)[-2000:] for i in range(len(self.processes)))
            time.sleep(0.1)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def free_port() -> int:
    """Returns a free port whose successor is free too."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            try:
                next_one.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except OSError:
                continue
            return one.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """`start(commands)` starts one process per command."""
    started = []

    def start(commands: list[list[str]]) -> Processes:
        started.append(Processes(tmp_path, commands))
        return started[-1]

    yield start
    for processes in started:
        processes.end()


@pytest.fixture(scope="module")
def tokens_of_one_device() -> list[list[int]]:
    config = replace(serve_together.CONFIG, num_pages=serve_together.PAGES, prefetch=0)
    with Engine(*serve_together.make_model(), config) as engine:
        serve_together.load_adapters(engine)
        tokens = serve_together.serve(engine)
    assert len({tuple(row) for row in tokens}) == len(tokens)
    return tokens


def together(mode: str, count: int) -> list[list[str]]:
    """The commands of `serve_together.py`."""
    port = free_port()
    return [[serve_together.__file__, mode, str(i), str(count), str(port)] for i in range(count)]


def test_two_processes_give_the_tokens_of_one_and_end_when_a_follower_is_killed(start, tokens_of_one_device) -> None:
    processes = start(together("serve", 2))
    served = processes.served()
    assert served["tokens"] == served["again"] == tokens_of_one_device
    assert served["num_pages"] == serve_together.PAGES - 1, "the least of all processes"
    for count in ("preemptions", "adapter_evictions", "staged"):
        assert served[count] > 0, f"the traffic is too light: no {count}"
    processes.processes[1].kill()
    assert processes.statuses(SECONDS_TO_END) == [EXIT_LOST, -signal.SIGKILL]
    assert "process 1 is lost" in processes.errors(0)  # by itself, or as the reason why a collective failed


def test_a_follower_of_an_idle_leader_ends_when_the_leader_is_killed(start) -> None:
    processes = start(together("idle", 2))
    assert processes.served() == {}
    processes.processes[0].kill()
    assert processes.statuses(SECONDS_TO_END) == [-signal.SIGKILL, EXIT_LOST]
    assert "process 0 is lost" in processes.errors(1)


def test_all_processes_end_with_the_reason_when_a_follower_fails(start) -> None:
    processes = start(together("fault", 2))
    assert processes.statuses(120) == [EXIT_LOST, EXIT_LOST]
    for i in range(2):
        assert "process 1 failed: RuntimeError('the device is on fire')" in processes.errors(i), i


def test_different_settings_are_named_by_both_processes(start) -> None:
    processes = start(together("differ", 2))
    assert processes.statuses(120) == [1, 1]
    for i in range(2):
        message = "EngineConfig.max_lora_rank: process 0 has 8, process 1 has 16; give all processes the same"
        assert f"ConfigError: {message}" in processes.errors(i)


def test_command_answers_as_in_one_process_and_both_processes_end(tmp_path, capfd, start) -> None:
    """Runs `slora generate` with an adapter that only process 0 has."""
    model_dir, adapter_dir = tmp_path / "model", tmp_path / "adapter"
    write_checkpoint(model_dir, num_layers=1, seed=1)
    write_peft(adapter_dir, random_adapter(adapter_geometry(ModelConfig.from_directory(model_dir), 16), 8, seed=0))
    command = ["generate", str(model_dir), "--prompt", "A language model", "--max-tokens", "8", "--dtype", "float32"]
    command += ["--max-model-len", "32"]
    assert cli.main([*command, f"--adapter=a={adapter_dir}"]) == 0
    expected = capfd.readouterr().out
    run = [serve_together.__file__, "slora"]
    together = ["--tensor-parallel-size=2", f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    processes = start(
        [
            [*run, *command, *together, "--process-id=0", f"--adapter=a={adapter_dir}"],
            [*run, *command, *together, "--process-id=1", "--adapter=a=/not/here"],
        ]
    )
    assert processes.statuses(200) == [0, 0], processes.errors(0) + processes.errors(1)
    assert [answer(processes.out(i)) for i in range(2)] == [expected, ""]


def test_server_answers_as_in_one_process_and_fails_requests_when_a_follower_is_killed(tmp_path, start) -> None:
    model_dir, adapters, prompt = tmp_path / "model", tmp_path / "adapters", "A language model"
    write_checkpoint(model_dir, num_layers=1, seed=1)
    write_peft(adapters / "a", random_adapter(adapter_geometry(ModelConfig.from_directory(model_dir), 16), 8, seed=0))
    options = {"dtype": "float32", "max_model_len": 32, "num_pages": 64, "compile_ahead": False}
    with Engine.from_pretrained(model_dir, EngineConfig(**options)) as engine:
        engine.load_adapter("a", adapters / "a")
        [expected] = engine.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True), "a")
    (tmp_path / "server.yaml").write_text(json.dumps({"engine": options}))
    command = [serve_together.__file__, "slora", "serve", str(model_dir), f"--config={tmp_path / 'server.yaml'}"]
    command += [f"--adapters={adapters}", f"--port={(port := free_port())}", "--tensor-parallel-size=2"]
    command += [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    processes = start([[*command, f"--process-id={i}"] for i in range(2)])

    def complete() -> dict:
        asked = {"model": "a", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(asked | {"return_token_ids": True}).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["choices"][0]

    while "ready: " not in processes.errors(0):
        assert processes.processes[0].poll() is None, processes.errors(0)
        time.sleep(0.1)
    assert complete()["token_ids"] == expected.token_ids
    processes.processes[1].kill()
    with pytest.raises(urllib.error.HTTPError) as raised:
        complete()
    assert raised.value.code in (500, 503)
    assert processes.statuses(SECONDS_TO_END) == [EXIT_LOST, -signal.SIGKILL]


def answer(out: str) -> str:
    """Removes the lines of gloo, the library of CPU collectives."""
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
