"""Each mechanism on and off, side by side: `python -m experiments.mechanisms`.

On the real engine, on a CPU, with a small random model: prefetch, unified memory against fixed splits, the prefix
cache, eviction policies. In the simulator, on the paper's devices: prefetch, and unified memory against fixed splits.
Writes a JSON file and a picture beside it.

On a CPU a copy to the device is a copy within the same memory, done by the cores that compute: what prefetch hides here
is the disk. That a GPU copies beside its computing is in the simulator only.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.machine import provenance
from experiments.mechanisms.engine import COMPARISONS
from experiments.mechanisms.scale import FULL, QUICK, Scale
from experiments.mechanisms.simulated import simulated
from experiments.mechanisms.table import table

PARTS = (*COMPARISONS, "simulator")


def compare(scale: Scale, parts: list[str]) -> dict[str, Any]:
    """Runs the parts and returns their results as JSON values."""
    engine = {name: COMPARISONS[name](scale) for name in parts if name != "simulator"}
    return {
        "settings": asdict(scale),
        "provenance": provenance(),
        "engine": engine,
        "simulator": simulated(scale) if "simulator" in parts else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, in half a minute; its numbers mean nothing")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, help="timed repetitions of every load on the engine")
    parser.add_argument("--note", default="", help="what to know about the machine during the run; kept in the file")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/mechanisms.json"))
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    if args.rounds:
        scale = replace(scale, rounds=args.rounds)
    results = {"note": args.note} | compare(scale, args.only)
    for line in table(results):
        print(line)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1, default=str) + "\n")
    print(f"written to {args.output}")
    if args.only == list(PARTS):
        from experiments.mechanisms.picture import draw

        draw(results, args.output.with_suffix(".png"))
        print(f"written to {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
