"""Logs of requests in files, read row by row: CSV with a header, or JSON lines."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax import SloraError

JSON_LINES = (".jsonl", ".ndjson")
COUNT = re.compile(r"[0-9]{1,15}")


class LogError(SloraError, ValueError):
    """A log cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Row:
    """fields: of a CSV row all are text. line: of the file, from 1."""

    file: Path
    line: int
    fields: Mapping[str, Any]

    def tokens(self, field: str) -> int:
        """A number of tokens, at least 0.

        Raises:
          LogError: it is none.
        """
        value = self.fields[field]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, str) and COUNT.fullmatch(value.strip()):
            return int(value)
        raise self.error(field, "must be a number of tokens, in digits")

    def time(self, field: str) -> float:
        """Seconds since any origin: a number, or a date and time as in ISO 8601 (without a zone: UTC).

        Raises:
          LogError: it is neither.
        """
        value = self.fields[field]
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (ValueError, TypeError, OverflowError):
            try:
                moment = datetime.fromisoformat(str(value).strip())
                seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            except (ValueError, OverflowError):
                seconds = math.nan
        if not math.isfinite(seconds):
            raise self.error(field, "must be seconds, or a time like 2023-11-16 18:15:46.68")
        return seconds

    def text(self, field: str) -> str:
        """A name.

        Raises:
          LogError: it is empty, or no text.
        """
        value = self.fields[field]
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "must be a name")
        return value.strip()

    def error(self, field: str, remedy: str) -> LogError:
        return LogError(f"{self.file}, line {self.line}: {field}={str(self.fields[field])[:80]!r}: {remedy}")


def read_log(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that has at least `columns`: JSON objects, one a line, if its name ends in .jsonl or .ndjson,
    else CSV. UTF-8, with or without a byte order mark; empty lines are skipped.

    Raises:
      OSError: it cannot be read. LogError: it is not such a file.
    """
    rows = _json_rows(file, columns) if file.suffix.lower() in JSON_LINES else _csv_rows(file, columns)
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except (UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise LogError(f"{file}, after line {line}: {error}: must be text in UTF-8") from error


def _csv_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise LogError(f"{file}, line 1: is empty; must be a header with {', '.join(columns)}")
        for name in columns:
            if header.count(name) != 1:
                found = "missing" if name not in header else "there more than once"
                raise LogError(f"{file}, line 1: the column {name} is {found}; there are {', '.join(header)[:200]}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise LogError(f"{file}, line {reader.line_num}: {len(values)} fields; the header has {len(header)}")
            yield Row(file, reader.line_num, dict(zip(header, values, strict=True)))


def _json_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise LogError(f"{file}, line {number}: {error}; must be a JSON object") from error
            if not isinstance(fields, dict):
                raise LogError(f"{file}, line {number}: must be a JSON object, not {line.strip()[:80]}")
            for name in columns:
                if name not in fields:
                    raise LogError(f"{file}, line {number}: the field {name} is missing")
            yield Row(file, number, fields)


def rescaled(file: Path, times: Sequence[float], duration: float) -> np.ndarray:
    """Ascending times, linearly to [0, duration]: bursts keep their shape.

    Raises:
      LogError: they span no time.
    """
    since = np.array(times) - times[0]
    if not since[-1] > 0:
        raise LogError(f"{file}: the {len(times)} requests wanted span no time, and cannot be rescaled")
    return since / since[-1] * duration
