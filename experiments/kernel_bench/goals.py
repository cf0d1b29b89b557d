"""The goals of the kernels on an H200, compared with the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

PEERS = ("xla", "ragged_dot", "loop")
"""Systems that are not kernels of this project."""


def fraction(row: Row) -> float:
    """Bandwidth as a fraction of the copy bandwidth."""
    return row["bandwidth_fraction"] or 0.0


def ratio(row: Row) -> float:
    """Time over the floor."""
    return row["over_floor"]


def _kind(row: Row) -> str:
    return f"{row['op']} {row['regime']}"


GOALS: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], float], float], ...] = (
    (
        "decode LoRA at 80% of the copy bandwidth with 64 or more distinct adapters",
        lambda row: _kind(row) == "lora decode" and row["facts"]["adapters"] >= 64, fraction, 0.8,
    ),
    (
        "paged decode attention at 80% of the copy bandwidth with contexts of 4k or more, batch 64",
        lambda row: (
            _kind(row) == "attention decode" and row["facts"]["batch"] == 64 and row["facts"]["context"] >= 4096
        ),
        fraction, 0.8,
    ),
    (
        "prefill LoRA within 1.3x of the larger of its two floors",
        lambda row: _kind(row) == "lora prefill", ratio, 1.3,
    ),
    (
        "a decode step with 64 rank-16 adapters within 1.15x of base-only plus the floor of the LoRA bytes",
        lambda row: _kind(row) == "step decode" and row["system"] == "64 adapters" and row["facts"]["rank"] == 16,
        ratio, 1.15,
    ),
)  # fmt: skip
"""Text, cases, number and bound: a fraction must be at least its bound, a ratio at most."""


def goals(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns `{"goal", "met", "measured"}` for every goal; `met` is None without results. A case counts with its best
    backend, a goal with its worst case."""
    rows = [row for row in rows if "over_floor" in row and "unchecked" not in row and row["system"] not in PEERS]
    return [_judge(text, list(filter(chosen, rows)), number, bound) for text, chosen, number, bound in GOALS]


def _judge(text: str, rows: list[Row], number: Callable[[Row], float], bound: float) -> dict[str, Any]:
    if not rows:
        return {"goal": text, "met": None, "measured": "not measured"}
    better, worse = (max, min) if number is fraction else (min, max)
    best = [better((row for row in rows if row["label"] == label), key=number) for label in {r["label"] for r in rows}]
    met = [number(row) >= bound if number is fraction else number(row) <= bound for row in best]
    worst = worse(best, key=number)
    where = f"{worst['label']}, {worst['system']}"
    measured = f"{number(worst):.3f} at worst ({where}); {sum(met)} of {len(met)} cases"
    return {"goal": text, "met": all(met), "measured": measured}
