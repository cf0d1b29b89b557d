"""A table of the compiled kernels, which needs no GPU: `python -m experiments.kernel_bench --compiled h200`.

Rows of version "old" are of the kernels before their second pass, and were counted in the same way; rows of version
"predicted" were written before the new kernels were compiled. Both stay in the results file.

    [{"kernel", "case", "device", "version": "old" | "new" | "predicted", "registers", "instructions_per_kb",
      "launches", "blocks", "dead_blocks"}]

`registers` are per thread; `instructions_per_kb` are instructions of a warp per KiB of weights or KV that the kernel
reads; `launches` are per layer and step; `dead_blocks` are those of `blocks` without work. A number that does not apply
is null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.kernel_bench import compiled_lora
from pallas_kernels.devices import Device

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "compiled_kernels.json"
VERSIONS = ("old", "new", "predicted")
NUMBERS = ("registers", "instructions_per_kb", "launches", "blocks", "dead_blocks")
COLLECT: tuple[Callable[[Device], Iterable[Row]], ...] = (compiled_lora.rows,)
"""Functions that compile an op's kernels and return their rows of version "new"."""


def update(device: Device, path: Path = RESULTS) -> list[Row]:
    """Compiles every kernel for `device`, replaces its "new" rows in the results file and returns the device's rows."""
    rows = json.loads(path.read_text()) if path.exists() else []
    new = [row for collect in COLLECT for row in collect(device)]
    replaced = {_key(row) for row in new}
    rows = [row for row in rows if row["version"] != "new" or _key(row) not in replaced] + new
    rows.sort(key=lambda row: (*_key(row), VERSIONS.index(row["version"])))
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    return [row for row in rows if row["device"] == device.name]


def table(rows: Iterable[Row]) -> str:
    """The rows as text: a line for each kernel and case, each number as old, new and predicted."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(_key(row), {})[row["version"]] = row
    lines: list[tuple[str, ...]] = [("kernel", "case", *NUMBERS)]
    for (_, kernel, case), versions in sorted(found.items()):
        numbers = []
        for name in NUMBERS:
            values = [versions.get(version, {}).get(name) for version in VERSIONS]
            numbers.append(" / ".join("-" if value is None else f"{value:g}" for value in values))
        lines.append((kernel, case, *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([f"every number: {' / '.join(VERSIONS)}", *text])


def _key(row: Row) -> tuple[str, ...]:
    return row["device"], row["kernel"], row["case"]
