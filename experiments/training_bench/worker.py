"""One system in a process of its own: `python -m experiments.training_bench.worker`. A line of JSON in, one out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.training_bench.settings import Cell

MODULES = {"slora-jax": "slora_system", "peft": "peft_system", "stack": "stack_system", "ragged_dot": "stack_system"}
PACKAGES = {"peft": ("torch", "peft", "transformers")}


def main() -> None:
    """Reads the settings, replies with versions, and then carries out a step for every message until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print: their lines belong to the log
    settings = json.loads(sys.stdin.readline())
    name, cell = settings["system"], Cell(**settings["cell"])
    module = import_module(f"experiments.training_bench.{MODULES[name]}")
    system = module.System(settings["model"], settings["adapters"], cell, name)
    packages = PACKAGES.get(name, ("jax", "jaxlib", "optax"))
    _reply(replies, {package: importlib.metadata.version(package) for package in packages})
    for line in sys.stdin:
        message = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        losses = system.step(message["step"], message["adapters"])
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        _reply(replies, {"seconds": seconds, "cpu_seconds": cpu, "losses": losses, "peak_mib": peak_mib()})


def peak_mib() -> float:
    """This process's largest resident memory. `ru_maxrss` would include its parent's before the program started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _reply(replies: Any, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
