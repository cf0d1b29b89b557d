"""The goals of the kernels on an H200, met or not, from the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

PEERS = ("xla", "ragged_dot", "loop")
"""Systems that are no kernels of ours."""


def goals(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each goal: `met` is None where nothing of it was measured. Of several backends the best one counts, case by
    case; the worst case decides."""
    rows = [row for row in rows if "over_floor" in row and "unchecked" not in row and row["system"] not in PEERS]

    def judge(
        goal: str,
        cases: list[Row],
        number: Callable[[Row], float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> dict[str, Any]:
        if not cases:
            return {"goal": goal, "met": None, "measured": "not measured"}
        better, worse = (max, min) if at_most is None else (min, max)
        best = [
            better((row for row in cases if row["label"] == label), key=number) for label in {r["label"] for r in cases}
        ]
        low, high = at_least or 0.0, float("inf") if at_most is None else at_most
        met = [low <= number(row) <= high for row in best]
        worst = worse(best, key=number)
        where = f"{worst['label']}, {worst['system']}"
        measured = f"{number(worst):.3f} at worst ({where}); {sum(met)} of {len(met)} cases"
        return {"goal": goal, "met": all(met), "measured": measured}

    def fraction(row: Row) -> float:
        return row["bandwidth_fraction"] or 0.0

    def ratio(row: Row) -> float:
        return row["over_floor"]

    def decode(op: str) -> Callable[[Row], bool]:
        return lambda row: (row["op"], row["regime"]) == (op, "decode")

    attention, lora, step = (list(filter(decode(op), rows)) for op in ("attention", "lora", "step"))
    return [
        judge(
            "decode LoRA at 80% of the copy bandwidth from 64 distinct adapters up",
            [row for row in lora if row["facts"]["adapters"] >= 64], fraction, at_least=0.8,
        ),
        judge(
            "paged decode attention at 80% of the copy bandwidth from 4k context, batch 64",
            [row for row in attention if row["facts"]["batch"] == 64 and row["facts"]["context"] >= 4096],
            fraction, at_least=0.8,
        ),
        judge(
            "prefill LoRA within 1.3x of the larger of its two floors",
            [row for row in rows if (row["op"], row["regime"]) == ("lora", "prefill")], ratio, at_most=1.3,
        ),
        judge(
            "a decode step with 64 rank-16 adapters within 1.15x of base-only plus the floor of the LoRA bytes",
            [row for row in step if row["system"] == "64 adapters" and row["facts"]["rank"] == 16], ratio, at_most=1.15,
        ),
    ]  # fmt: skip
