"""Watches the process that measures: a kernel that hangs or crashes costs its own results only.

A kernel that was never run on a GPU may do either, and an illegal access leaves a CUDA context in which nothing works.
So the cases run in a child, which says in the results file what it is about to do and for how long; a child that dies
or overstays is replaced by one that goes on behind the case at fault.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.record import Record

RESTART = 75
"""Exit status of a child whose device context is broken, after it has recorded why."""

MOST_CHILDREN = 10
GRACE = 10.0
"""Seconds past the deadline until a child is stopped."""


def supervise(command: Sequence[str], path: Path, deadline: float, environment: dict[str, str]) -> str:
    """Runs `command`, which writes a `Record` to `path`, until that is finished; `command` with "--resume" after a
    failure. A child that exits with RESTART has recorded its failure itself. Returns why there was no end, or ""."""
    for number in range(MOST_CHILDREN):
        child = subprocess.Popen([*command, *["--resume"] * (number > 0)], env=environment)
        try:
            reason = _watch(child, path, deadline)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        if _read(path).get("finished"):
            return ""
        if not path.exists() or time.time() > deadline:
            return reason
        if child.returncode != RESTART:
            Record(path, resume=True).fail_under_way(reason)
        print(f"the measuring process ended: {reason}; going on without what it was doing", flush=True)
    return f"the measuring process ended {MOST_CHILDREN} times"


def _watch(child: subprocess.Popen, path: Path, deadline: float) -> str:
    """Waits for the child's end, or until it overstays. Returns why it ended."""
    while child.poll() is None:
        time.sleep(0.2)
        results = _read(path)
        if results.get("finished"):
            return ""
        what = results.get("under_way")
        if what and time.time() > what["until"]:
            return f"hung: {what['what']} {what['system']} did not end in time"
        if time.time() > deadline + GRACE:
            return "past its deadline"
    code = child.returncode
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _read(path: Path) -> dict[str, Any]:
    """The results so far; nothing if there are none."""
    return json.loads(path.read_text()) if path.exists() else {}


def worker_environment(miniature: bool) -> dict[str, str]:
    """The child's environment: most of the GPU's memory for JAX, few logs, and the CPU where there is no GPU or for a
    miniature, whose programs need not be fast."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ
    if miniature or not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return environment
