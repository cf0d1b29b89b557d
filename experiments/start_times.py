"""How long the command line takes to answer, from its start: `python -m experiments.start_times --model MODEL`.

Every measurement is a process of its own with a home directory of its own, so that the first start finds nothing that
an earlier one compiled, and the second finds what the first did. `--beside CHECKOUT` measures another checkout of this
project too, in turn, by the same Python.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.machine import provenance, write_json

ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"
COMMAND = "import sys; from slora_jax.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Start:
    """One process.

    Attributes:
      answer_seconds: from its start to its first output, or to `/ready`.
      end_seconds: to its end.
      peak_mib: its largest resident memory.
    """

    answer_seconds: float
    end_seconds: float
    peak_mib: float


def run(checkout: Path, home: Path, arguments: Sequence[str], ready: str | None = None) -> Start:
    """Runs `slora` with `arguments`; with a URL `ready`, until that answers 200, then ends it.

    Raises:
      RuntimeError: the process failed; its last lines are in the message.
    """
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], cwd=checkout, env=environment,
            stdout=subprocess.PIPE if ready is None else errors, stderr=errors,
        )  # fmt: skip
        try:
            if ready is None:
                assert process.stdout is not None
                process.stdout.read(1)
                answered = time.perf_counter()
                process.stdout.read()
            else:
                _wait_for(ready, process)
                answered = time.perf_counter()
                process.terminate()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        end = time.perf_counter()
        if os.waitstatus_to_exitcode(status) not in (0, 2):
            errors.seek(0)
            raise RuntimeError(f"slora {' '.join(arguments)}: status {status}: {errors.read()[-2000:]}")
    return Start(round(answered - start, 2), round(end - start, 2), round(usage.ru_maxrss / 1024, 1))


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the server ended with status {process.returncode} before {url} answered")


def cases(model: str, port: int) -> dict[str, tuple[list[str], str | None]]:
    """Arguments of `slora`, and what to wait for, by the name of what is measured."""
    generate = ["generate", model, "--prompt", PROMPT, "--max-tokens", "12", "--dtype", "float32"]
    return {
        "help": (["--help"], None),
        "wrong argument": (["compile-report", "--target", "h100"], None),
        "generate, first start": (generate, None),
        "generate, second start": (generate, None),
        "serve, first start": (["serve", model, "--dtype", "float32", "--port", str(port)], "ready"),
        "serve, second start": (["serve", model, "--dtype", "float32", "--port", str(port)], "ready"),
    }


def measure(checkouts: dict[str, Path], model: Path) -> dict[str, dict[str, Start]]:
    """Every case on every checkout, in turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: dict[str, dict[str, Start]] = {}
    names = cases(str(model), port)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(names) * len(checkouts), unit="start") as bar:
        for case, (arguments, ready) in names.items():
            for name, checkout in checkouts.items():
                bar.set_description(f"{name}: {case}")
                home = Path(scratch) / name / case.split(",")[0]  # first and second starts share it
                home.mkdir(parents=True, exist_ok=True)
                url = ready and f"http://127.0.0.1:{port}/{ready}"
                results.setdefault(case, {})[name] = run(checkout, home, arguments, url)
                bar.update()
    return results


def table(results: dict[str, dict[str, Start]]) -> str:
    """Seconds to the first output or `/ready`, and peak memory, for a terminal."""
    lines = []
    for case, starts in results.items():
        values = "   ".join(f"{name} {s.answer_seconds:7.2f} s {s.peak_mib:6.0f} MiB" for name, s in starts.items())
        lines.append(f"{case:24} {values}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory or GGUF file")
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    checkouts = {"here": ROOT} | ({"beside": args.beside.resolve()} if args.beside else {})
    results = measure(checkouts, args.model.resolve())
    print(table(results))
    if args.output:
        revision = ["git", "-C", str(args.beside or ROOT), "rev-parse", "--short", "HEAD"]
        values: dict[str, Any] = {
            "provenance": provenance(("jax", "jaxlib", "numpy", "transformers")),
            "beside": subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip(),
            "model": args.model.name,
            "starts": {case: {name: asdict(s) for name, s in starts.items()} for case, starts in results.items()},
        }
        write_json(args.output, values)


if __name__ == "__main__":
    main()
