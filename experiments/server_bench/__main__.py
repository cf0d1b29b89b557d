"""Cost of a token in the HTTP server: `python -m experiments.server_bench [--beside CHECKOUT] [--output FILE]`.

The real server, engine core and scheduler run without a model: a step takes no time (saturated), or gives every stream
a token each 20 ms (paced; 40 ms for more than 256 streams). Measured from outside: tokens per second; the time from the
engine's read of a token to its arrival at the client; CPU time for each token of the thread with the event loop, of the
first process's other threads (the engine), and of HTTP processes. The client has one event loop on the same machine:
where its share of a core is near 1, it limits the rate. With several servers, their rounds are interleaved.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from experiments.machine import provenance, write_json
from experiments.server_bench.client import measure
from experiments.server_bench.server import FREE, MAX_STREAMS, PACED, STEP_SECONDS
from slora_jax.demo.checkpoint import Widths, write_checkpoint

HERE = Path(__file__).parents[2]
DEFAULT_OUTPUT = HERE / "experiments" / "results" / "server_bench.json"
WIDTHS = Widths(hidden=32, heads=4, kv_heads=2, ffn=48)
START_SECONDS = 120
PARTS = ("event_loop", "engine", "http_processes")
"""The first process's main thread, its other threads, and all other processes."""


class Server:
    """A server of one checkout, ready when the block begins."""

    def __init__(self, checkout: Path, http_processes: int, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = log
        self._command = [sys.executable, str(Path(__file__).with_name("server.py")), str(model)]
        self._command += [str(self.port), str(http_processes)]
        self._environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}

    def __enter__(self) -> Self:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def cpu_seconds(self) -> np.ndarray:
        """Returns the CPU time of its parts, as in `PARTS`."""
        first = psutil.Process(self._process.pid)
        [main] = [one.user_time + one.system_time for one in first.threads() if one.id == first.pid]
        whole, *others = (sum(one.cpu_times()[:2]) for one in (first, *first.children(recursive=True)))
        return np.array([main, whole - main, sum(others)])

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                return True
        except OSError:
            return False


def one_round(server: Server, streams: int, is_paced: bool, seconds: float) -> dict[str, float]:
    """Measures one server once."""
    every = 1 if streams <= 256 else 2
    arrived = measure(server.port, streams, [PACED if is_paced else FREE, every], seconds, server.cpu_seconds)
    tokens = arrived.times.size
    parts = 1e6 * (arrived.after - arrived.before) / tokens
    found = {"tokens_per_second": tokens / arrived.seconds, "cpu_us_per_token": float(parts.sum())}
    found |= {f"{name}_us_per_token": float(part) for name, part in zip(PARTS, parts, strict=True)}
    found["client_core_share"] = arrived.cpu_seconds / arrived.seconds
    if is_paced:
        latencies = 1e3 * arrived.latencies()
        found |= {f"added_ms_p{share}": float(np.percentile(latencies, share)) for share in (50, 99)}
    return found


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every server, with rounds interleaved. Returns medians and all rounds."""
    servers: dict[str, tuple[Path, int]] = {f"http_processes={n}": (HERE, n) for n in args.http_processes}
    if args.beside is not None:
        servers["beside"] = (args.beside.resolve(), 0)
    cases: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        root = Path(directory)
        write_checkpoint(root / "model", 1, 0, WIDTHS)
        started = {
            name: stack.enter_context(Server(checkout, processes, root / "model", root / f"{name}.log"))
            for name, (checkout, processes) in servers.items()
        }
        for number in range(args.rounds):
            for streams in args.streams:
                for kind in ("paced", "saturated"):
                    for name in list(started)[:: -1 if number % 2 else 1]:
                        found = one_round(started[name], streams, kind == "paced", args.seconds)
                        cases.setdefault(f"{kind}, {streams} streams", {}).setdefault(name, []).append(found)
                        shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
                        print(f"{kind:9} {streams:3} streams, {name}: {shown}", flush=True)
    return {
        "command": "python -m experiments.server_bench " + " ".join(f"--{n} {v}" for n, v in _shown(args).items()),
        "step_seconds": STEP_SECONDS,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "beside": None if args.beside is None else _revision(args.beside),
        "medians": {case: {name: _medians(rounds) for name, rounds in of.items()} for case, of in cases.items()},
        "cases": {
            case: {name: [_rounded(one) for one in rounds] for name, rounds in of.items()} for case, of in cases.items()
        },
        "load": "other programs may have used the machine's cores at the same time",
        "provenance": provenance(("numpy", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "tokenizers")),
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return _rounded({key: statistics.median(one[key] for one in rounds) for key in rounds[0]})


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in found.items()}


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    listed = {name: " ".join(map(str, getattr(args, name.replace("-", "_")))) for name in ("http-processes", "streams")}
    shown = listed | {"rounds": args.rounds, "seconds": args.seconds}
    return shown | ({"beside": "CHECKOUT"} if args.beside else {})


def _revision(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, measured in turn")
    parser.add_argument("--http-processes", type=int, nargs="+", default=[0], metavar="N", help="one server for each")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a measurement")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    if max(args.streams) > MAX_STREAMS:
        parser.error(f"--streams {max(args.streams)}: must be at most {MAX_STREAMS}")
    write_json(args.output, benchmark(args))


if __name__ == "__main__":
    main()
