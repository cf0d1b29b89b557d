"""The results file, which is replaced after every result, so a crash loses none.

    {"command", "started", "miniature", "budget_seconds", "finished": bool, "provenance": {...},
     "checks": [{"section", "op", "regime", "facts", "system", "error", "max_error", "tolerance", "ok"}],
     "programs": [{"name", "seconds", "temp_bytes"}],
     "rows": [{"section", "op", "regime", "facts", "system", "importance", "repeats", "bytes", "flops", "seconds",
               "rounds", "dispatches", "queueing_seconds", "floor_seconds", "over_floor", "bandwidth_fraction"}],
     "goals": [{"goal", "met": true | false | null, "measured"}], "ended_early": {section: reason}}

Seconds are of one repeat. A check, program or row without numbers has the reason in "skipped" or "failed". A result
without a reference has "unchecked".
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pallas_kernels.bench.case import Case

BROKEN_DEVICE = 75
"""Exit status of a process that has recorded a failure after which the device does not respond."""


class Record:
    """A results file, read from `path` if it exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"checks": [], "programs": [], "rows": [], "goals": [], "finished": False}
        if path.exists():
            self.data = json.loads(path.read_text())

    def begin(self, limit: float, case: Case | None = None, system: str = "", section: str = "") -> None:
        """Notes what runs from now on, for at most `limit` seconds: a system of a case, all its systems (""), or the
        compiler (no case). The parent process reads this if the process dies."""
        row = self._row(case, system, section) if case else None
        self.data["under_way"] = {"row": row, "until": time.time() + limit}
        self.save()

    def fail_under_way(self, reason: str) -> bool:
        """Records `reason` as the result of what was under way. Returns whether that was a system of a case."""
        row = (self.data.pop("under_way", None) or {}).get("row")
        if row:
            self.data["checks" if row.pop("is_check") else "rows"].append(row | {"failed": reason})
        self.save()
        return bool(row)

    def add(self, case: Case, system: str, section: str, **results: Any) -> dict[str, Any]:
        """Adds a check or a row with its numbers."""
        row = self._row(case, system, section) | results
        self.data["checks" if row.pop("is_check") else "rows"].append(row)
        self.save()
        return row

    def has(self, case: Case, system: str) -> bool:
        """Returns whether a case's system has a result, or all its systems have failed."""
        rows = self.data["checks" if case.is_check else "rows"]
        return any(row["label"] == case.label and row["system"] in (system, "") for row in rows)

    def save(self) -> None:
        """Replaces the file in one step."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)

    @staticmethod
    def _row(case: Case, system: str, section: str) -> dict[str, Any]:
        return {
            "section": section,
            "op": case.op,
            "regime": case.regime,
            "facts": dict(case.facts),
            "label": case.label,
            "system": system,
            "importance": case.importance,
            "is_check": case.is_check,
        }
