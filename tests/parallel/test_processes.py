"""Two real processes on loopback, each with one device and half of the model, give the tokens of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

SCRIPT = Path(__file__).with_name("serve_together.py")


def start(process: int, processes: int, port: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(process), str(processes), str(port)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tokens_of(worker: subprocess.Popen) -> list[list[int]]:
    out, errors = worker.communicate(timeout=280)
    assert worker.returncode == 0, errors[-2000:]
    return json.loads(out.splitlines()[-1])


def test_two_processes_give_the_tokens_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [start(0, 1, 0), start(0, 2, port), start(1, 2, port)]
    try:
        alone, *together = map(tokens_of, workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert together == [alone, alone]
    assert len({tuple(tokens) for tokens in alone}) == 6
