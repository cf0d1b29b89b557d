"""A table of the compiled kernels, which needs no GPU: `python -m experiments.kernel_bench --compiled h200`.

Rows of version "old" are of the kernels before their second pass, and were counted in the same way; rows of version
"predicted" were written before the new kernels were compiled. Both stay in the results file.

    [{"kernel", "case", "device", "version": "old" | "new" | "predicted", NUMBERS ...}]

`registers` are per thread; `instructions_per_kb` are instructions of a warp per KiB of weights that the kernel reads;
`launches` are of one call, of the sampler's programs, or of a whole step; `dead_blocks` are those of `blocks` without
work; `waves` are items over resident programs. A number that does not apply is null or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.kernel_bench import compiled_attention, compiled_lora, compiled_step
from pallas_kernels.devices import Device

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "compiled_kernels.json"
VERSIONS = ("old", "new", "predicted")
NUMBERS = (
    "registers", "instructions_per_kb", "launches", "blocks", "dead_blocks", "waves", "compare_and_swaps", "temp_bytes",
    "is_sequential",
)  # fmt: skip
COLLECT: tuple[Callable[[Device], Iterable[Row]], ...] = (
    compiled_lora.rows,
    compiled_attention.rows,
    compiled_step.rows,
)
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
    """The rows as text, a table for each kernel: each number as old, new and predicted."""
    kernels: dict[str, dict[str, dict[str, Row]]] = {}
    for row in sorted(rows, key=_key):
        kernels.setdefault(row["kernel"], {}).setdefault(row["case"], {})[row["version"]] = row
    parts = [f"every number: {' / '.join(VERSIONS)}"]
    for kernel, cases in kernels.items():
        found = [row for versions in cases.values() for row in versions.values()]
        names = [name for name in NUMBERS if any(row.get(name) is not None for row in found)]
        lines: list[tuple[str, ...]] = [(kernel, *names)]
        for case, versions in cases.items():
            lines.append(
                (case, *(" / ".join(_text(versions.get(v, {}).get(name)) for v in VERSIONS) for name in names))
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _key(row: Row) -> tuple[str, ...]:
    return row["device"], row["kernel"], row["case"]
