"""Plan tables: the block shapes of a kernel by device and shape, as data (`<op>/plans.json`).

A table is a list of entries `{"op", "device", "when", "plan"}`. `when` maps a fact to its required value or to a range
`[lowest, highest]` (null: no bound). The first matching entry applies; entries of `"any"` follow the device's own.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from pallas_kernels import devices


@cache
def _table(folder: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(resources.files(f"pallas_kernels.{folder}").joinpath("plans.json").read_text()))


def find(folder: str, op: str, **facts: Any) -> dict[str, Any]:
    """Returns the plan of `op` on the current trace's device.

    Raises:
      LookupError: no entry matches; the message has the facts.
    """
    target = devices.target()
    names = (target.name if target else "any", "any")
    for name in names:
        for entry in _table(folder):
            if entry["op"] == op and entry["device"] == name and _fits(entry["when"], facts):
                return entry["plan"]
    raise LookupError(f"pallas_kernels/{folder}/plans.json: no plan of {op} on {names[0]} for {facts}")


def _fits(when: dict[str, Any], facts: dict[str, Any]) -> bool:
    for fact, wanted in when.items():
        value = facts[fact]
        if isinstance(wanted, list):
            lowest, highest = wanted
            if (lowest is not None and value < lowest) or (highest is not None and value > highest):
                return False
        elif value != wanted:
            return False
    return True
