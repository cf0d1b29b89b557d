"""Tables in Markdown, and fields of results."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any


def pick(values: Any, names: str) -> list[Any]:
    """Fields by their dotted names, which `names` separates by spaces."""
    return [reduce(lambda at, name: at[name], path.split("."), values) for path in names.split()]


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """header: the columns' titles, separated by " | "."""
    lines = [header, " | ".join("---" for _ in header.split("|")), *(" | ".join(map(cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    """Three significant digits."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)


def percent(value: float | None) -> str:
    """Two significant digits."""
    return "" if value is None else f"{100 * value:.2g}%"


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
