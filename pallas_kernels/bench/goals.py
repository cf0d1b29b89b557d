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
    rows = [row for row in rows if "over_floor" in row and row["system"] not in PEERS]

    def judge(
        goal: str, number: Callable[[Row], float], limit: float, at_least: bool, wanted: Callable[[Row], bool]
    ) -> dict[str, Any]:
        best: dict[str, Row] = {}
        for row in filter(wanted, rows):
            other = best.get(key := row["label"] if row["op"] != "step" else row["label"] + row["system"])
            if other is None or (number(row) > number(other)) == at_least:
                best[key] = row
        if not best:
            return {"goal": goal, "met": None, "measured": "not measured"}
        worst = (min if at_least else max)(best.values(), key=number)
        met = number(worst) >= limit if at_least else number(worst) <= limit
        count = sum((number(row) >= limit) if at_least else (number(row) <= limit) for row in best.values())
        where = f"{worst['label']}, {worst['system']}"
        return {
            "goal": goal,
            "met": met,
            "measured": f"{number(worst):.3f} at worst ({where}); {count} of {len(best)} cases",
        }

    def fraction(row: Row) -> float:
        return row["bandwidth_fraction"] or 0.0

    def ratio(row: Row) -> float:
        return row["over_floor"]

    return [
        judge(
            "decode LoRA at 80% of the copy bandwidth from 64 distinct adapters up",
            fraction, 0.8, True, lambda r: (r["op"], r["regime"]) == ("lora", "decode") and r["facts"]["adapters"] >= 64,
        ),
        judge(
            "paged decode attention at 80% of the copy bandwidth from 4k context, batch 64",
            fraction, 0.8, True,
            lambda r: (r["op"], r["regime"]) == ("attention", "decode")
            and r["facts"]["batch"] == 64 and r["facts"]["context"] >= 4096,
        ),
        judge(
            "prefill LoRA within 1.3x of the larger of its two floors",
            ratio, 1.3, False, lambda r: (r["op"], r["regime"]) == ("lora", "prefill"),
        ),
        judge(
            "a decode step with 64 rank-16 adapters within 1.15x of base-only plus the floor of the LoRA bytes",
            ratio, 1.15, False, lambda r: r["op"] == "step" and r["system"] == "64 adapters" and r["facts"]["rank"] == 16,
        ),
    ]  # fmt: skip
