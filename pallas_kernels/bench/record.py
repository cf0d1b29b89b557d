"""The results as JSON, written after every step, so that an end at any moment loses nothing; and where they are from.

    {"command", "started", "miniature", "budget_seconds", "finished": bool, "provenance": {...},
     "checks": [{"section", "op", "regime", "facts", "system", "error", "max_error", "tolerance", "ok"}],
     "programs": [{"name", "seconds", "temp_bytes"}],
     "rows": [{"section", "op", "regime", "facts", "system", "importance", "repeats", "bytes", "flops", "seconds",
               "rounds", "dispatches", "queueing_seconds", "floor_seconds", "over_floor", "bandwidth_fraction"}],
     "goals": [{"goal", "met": true | false | null, "measured"}]}

Seconds are of one repeat. A check or row that came to nothing has, instead of its numbers, "skipped" or "failed": why.
"unchecked" are results that there was no reference for.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pallas_kernels.bench.case import Case


class Record:
    """A results file. What is under way, and how long it may take, is in it too: for the process that watches."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"checks": [], "programs": [], "rows": [], "goals": [], "finished": False}
        if resume:
            self.data = json.loads(path.read_text())

    def begin(self, what: str, system: str, limit: float) -> None:
        """Notes what is done from now on, for at most `limit` seconds: a case and a system, or "compiling" and a
        program ("" where it is several)."""
        self.data["under_way"] = {"what": what, "system": system, "until": time.time() + limit}
        self.save()

    def add(self, case: Case, system: str, **results: Any) -> dict[str, Any]:
        """Adds a check or a row; `results`: its numbers."""
        row = {"op": case.op, "regime": case.regime, "facts": dict(case.facts), "label": case.label, "system": system}
        row |= results
        self.data["checks" if case.is_check else "rows"].append(row)
        self.save()
        return row

    def has(self, case: Case, system: str) -> bool:
        """Whether there is a result already."""
        rows = self.data["checks" if case.is_check else "rows"]
        return any(row["label"] == case.label and row["system"] == system for row in rows)

    def fail_under_way(self, reason: str) -> None:
        """Whatever was under way when the measuring process ended did not work, and is not tried again. Where that is
        one of many programs, they are compiled one by one from now on."""
        what = self.data.pop("under_way", None)
        if what is None:
            pass
        elif what["what"] == "compiling":
            self.data["one_by_one"] = True
            if what["system"]:
                self.data.setdefault("uncompilable", {})[what["system"]] = reason
        else:
            self.data.setdefault("fatal", []).append(
                {"label": what["what"], "system": what["system"], "failed": reason}
            )
        self.save()

    def fatal(self, case: Case, system: str) -> str:
        """How an earlier process ended over this case and system ("" if none did)."""
        for failure in self.data.get("fatal", ()):
            if failure["label"] == case.label and failure["system"] in (system, ""):
                return failure["failed"]
        return ""

    def save(self) -> None:
        """Replaces the file at once, never in part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)


def provenance() -> dict[str, Any]:
    """Machine, device, driver, versions, revision, date. Asks JAX for its devices."""
    import jax

    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "platform": device.platform,
        "driver": _output(
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit",
            "--format=csv,noheader",
        ),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "jax-triton", "triton", "flax", "numpy")},
        "git": _output(
            "git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
        ),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "argv": sys.argv,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    """What a command prints; "" where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
