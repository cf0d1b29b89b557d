"""The log of a training run, one JSON line for each adapter and step, and its curves as a picture."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_NAMED = 10
"""Most adapters whose names fit into the picture's legend."""

_LOG = logging.getLogger(__name__)


class StepLog:
    """Appends lines to a file. Numbers that JSON lacks (NaN, infinity) become null."""

    def __init__(self, path: Path, size: int) -> None:
        """Opens the file, created if missing.

        Args:
          size: bytes to keep; later lines are removed, because their steps are repeated.
        """
        self.path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        self._file.truncate(min(size, os.path.getsize(path)))

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line for each mapping."""
        for line in lines:
            self._file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written so far, all on the disk when this returns."""
        os.fsync(self._file.fileno())
        return os.path.getsize(self.path)

    def close(self) -> None:
        self._file.close()


def draw_curves(log: Path, picture: Path) -> None:
    """Draws the losses of a log over the steps as a PNG file; without matplotlib, logs a warning instead."""
    try:
        import matplotlib
    except ImportError:
        _LOG.warning("%s is not drawn: matplotlib is not installed; pip install slora-jax[plot]", picture)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}, "evaluation_loss": {}}
    with open(log, encoding="utf-8") as file:
        for line in map(json.loads, file):
            for kind, curves in points.items():
                if line.get(kind) is not None:
                    curves.setdefault(line["adapter"], []).append((line["step"], line[kind]))
    panels = {kind: curves for kind, curves in points.items() if curves}
    names = list(points["loss"])
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(5.5 * max(1, len(panels)), 4), squeeze=False)
    for axis, (kind, curves) in zip(axes[0], panels.items(), strict=False):
        for name, curve in curves.items():
            color = f"C{names.index(name) % 10}"
            axis.plot(*zip(*curve, strict=True), color=color, lw=1, marker="." if len(curve) < 50 else None, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel({"loss": "training loss", "evaluation_loss": "evaluation loss"}[kind])
        axis.grid(alpha=0.3)
    if panels and len(names) <= _NAMED:
        axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    new = picture.with_suffix(".new.png")
    figure.savefig(new, dpi=120)
    plt.close(figure)
    os.replace(new, picture)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
