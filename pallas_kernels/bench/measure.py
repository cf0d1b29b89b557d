"""Runs one section's cases: the checks, then the timed cases in order of importance, until the deadline."""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.bench.case import Case, Dispatch, System, declined, error_text
from pallas_kernels.bench.ceilings import Ceilings
from pallas_kernels.bench.compilation import compile_all
from pallas_kernels.bench.record import BROKEN_DEVICE, Record
from pallas_kernels.bench.size import Size
from pallas_kernels.bench.timing import Timing, time_in_turn

PATIENCE = 60.0
"""Seconds after which a system that has not finished its first dispatches counts as hung; on a CPU, ten times."""

FEWEST_ROUNDS = 3
OUT_OF_TIME = "out of time"


@dataclass
class Measurement:
    """Measures into `record`, and skips systems that have a result there. deadline: seconds since the epoch. budget:
    seconds of the section."""

    section: str
    size: Size
    record: Record
    deadline: float
    budget: float
    compiled: dict[str, Any] = field(default_factory=dict)

    def run(self, cases: Sequence[Case]) -> None:
        """Measures every case of the section."""
        order = sorted(cases, key=lambda case: (not case.is_check, case.importance))
        with tqdm(total=len(order), unit="case", file=sys.stderr, desc=self.section) as bar:
            for _, group in itertools.groupby(order, key=lambda case: (case.is_check, case.importance)):
                self._compile(together := list(group))
                for case in together:
                    bar.set_postfix_str(case.label)
                    if systems := self._open(case):
                        (self._check if case.is_check else self._measure)(case, systems)
                    bar.update()

    @property
    def patience(self) -> float:
        """Seconds for a system's first dispatches."""
        return PATIENCE * (10 if self.size.miniature else 1)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def _open(self, case: Case) -> list[System]:
        return [system for system in case.systems if not self.record.has(case, system.name)]

    def _compile(self, cases: Sequence[Case]) -> None:
        """Compiles the programs of these cases; errors are reported when the cases run."""
        systems = [s for case in cases for s in self._open(case) if s.program and not self._refusal(case, s)]
        wanted = {s.program.name: s.program for s in systems if s.program and s.program.name not in self.compiled}
        limit = 0.7 * self.left  # the rest is for running them
        if wanted and limit > 0:
            with self._watched(limit + self.patience):
                for done in compile_all(wanted.values(), limit):
                    self.compiled[done.program.name] = done.result
                    self.record.data["programs"].append(done.facts())

    @contextmanager
    def _watched(self, limit: float, case: Case | None = None, system: str = "") -> Iterator[None]:
        """Ends the process, with its threads' tracebacks on stderr, if the block takes more than `limit` seconds."""
        self.record.begin(limit, case, system, self.section)
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.record.data["under_way"] = None

    def _checks(self, case: Case, system: System) -> list[dict[str, Any]]:
        """Results of the checks that apply to a system in a timed case."""
        mine = (self.section, case.regime, system.name)
        return [c for c in self.record.data["checks"] if (c["section"], c["regime"], c["system"]) == mine]

    def _refusal(self, case: Case, system: System) -> str:
        """The reason why a system is not tried, or ""."""
        checks = () if case.is_check else self._checks(case, system)
        if any(check.get("ok") is False or "failed" in check for check in checks):
            return "failed its check"
        return system.skip

    def _started(self, case: Case, systems: Sequence[System]) -> dict[str, Dispatch]:
        """Dispatch functions of the systems that start; the other systems get their results here."""
        dispatches = {}
        for system in systems:
            compiled = self.compiled.get(system.program.name) if system.program else None
            if reason := self._refusal(case, system):
                self._note(case, system, skipped=reason)
            elif self.left <= 0 or isinstance(compiled, TimeoutError) or (system.program and compiled is None):
                self._note(case, system, skipped=OUT_OF_TIME)
            elif isinstance(compiled, Exception):
                self._note_error(case, system, compiled)
            else:
                try:
                    assert system.start is not None
                    with self._watched(self.patience, case, system.name):
                        dispatches[system.name] = system.start(compiled)
                except Exception as error:  # noqa: BLE001 - one system must not end the benchmark
                    self._note_error(case, system, error)
        return dispatches

    def _check(self, case: Case, systems: Sequence[System]) -> None:
        """Compares every system's result with that of the case's first system, the reference."""
        reference, others = case.systems[0], [s for s in systems if s is not case.systems[0]]
        if not others:
            return
        results = {}
        for name, dispatch in self._started(case, [reference, *others]).items():
            try:
                with self._watched(self.patience, case, name):
                    results[name] = jax.block_until_ready(dispatch())
            except Exception as error:  # noqa: BLE001 - see above
                self._note_error(case, next(s for s in case.systems if s.name == name), error)
        for system in others:
            if system.name not in results:
                continue
            if reference.name not in results:
                self._note(case, system, unchecked=f"there is no result of {reference.name!r}")
                continue
            assert case.tolerance is not None
            off, most = distance(results[system.name], results[reference.name])
            ok = off <= case.tolerance and most <= 10 * case.tolerance  # False for NaN
            self._note(case, system, error=off, max_error=most, tolerance=case.tolerance, ok=ok)

    def _measure(self, case: Case, systems: Sequence[System]) -> None:
        # A floor may rest on another system's time: that system is measured again beside the others.
        needed = {system.over for system in systems}
        systems = [s for s in case.systems if s in systems or s.name in needed]
        dispatches = self._started(case, systems)
        if not dispatches:
            return
        rounds = round(2 * self.size.rounds * max(0.0, self.left) / self.budget)  # all during the first half
        results = time_in_turn(
            dispatches,
            rounds=min(max(FEWEST_ROUNDS, rounds), self.size.rounds),
            round_seconds=self.size.round_seconds,
            watched=lambda name: self._watched(self.patience, case, name),
        )
        ceilings = Ceilings.of(self.record.data["rows"])
        for system in systems:
            match results.get(system.name):
                case Timing() as timing:
                    base = results.get(system.over)
                    over = base.seconds if isinstance(base, Timing) else None if system.over else 0.0
                    numbers = _numbers(case, system, timing, ceilings, over)
                    if any("unchecked" in check for check in self._checks(case, system)):
                        numbers["unchecked"] = True
                    self._note(case, system, **numbers)
                case Exception() as error:
                    self._note_error(case, system, error)

    def _note_error(self, case: Case, system: System, error: Exception) -> None:
        """Records an exception. Ends the process if the device does not respond any more."""
        if reason := declined(error):
            self._note(case, system, skipped=reason)
            return
        self._note(case, system, failed=error_text(error))
        try:
            jax.block_until_ready(jnp.zeros(1) + 1)
        except Exception:  # noqa: BLE001 - nothing works on this device context
            os._exit(BROKEN_DEVICE)

    def _note(self, case: Case, system: System, **results: Any) -> None:
        if not self.record.has(case, system.name):
            tqdm.write(line(self.record.add(case, system.name, self.section, **results)), file=sys.stdout)


def _numbers(
    case: Case, system: System, timing: Timing, ceilings: Ceilings | None, over: float | None
) -> dict[str, Any]:
    """A row's numbers. over: seconds added to the floor; None: unknown, so there is no floor."""
    work, seconds = system.work or case.work, timing.seconds / system.repeats
    numbers: dict[str, Any] = {
        "repeats": system.repeats,
        "bytes": work.bytes,
        "flops": work.flops,
        "seconds": seconds,
        "rounds": [round_ / system.repeats for round_ in timing.rounds],
        "dispatches": timing.dispatches,
        "queueing_seconds": timing.queueing_seconds / system.repeats,
    }
    if ceilings and over is not None and case.op != "ceiling":
        floor = over + work.seconds(ceilings.bandwidth, ceilings.matmul_flops)
        numbers |= {"floor_seconds": floor, "over_floor": seconds / floor}
        numbers["bandwidth_fraction"] = work.bytes / (seconds - over) / ceilings.bandwidth if seconds > over else None
    return numbers


def distance(result: Any, reference: Any) -> tuple[float, float]:
    """Returns the norm of the difference over the reference's norm, and its largest element over the reference's RMS,
    each the worst of the arrays. NaN anywhere gives NaN."""
    errors = []
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True):
        a, b = (jnp.asarray(x).astype(jnp.float32) for x in (ours, theirs))
        rms = jnp.sqrt(jnp.mean(b * b))
        errors.append([jnp.sqrt(jnp.mean((a - b) ** 2)) / rms, jnp.max(jnp.abs(a - b)) / rms])
    error, most = np.max(np.array(errors, np.float64), axis=0)
    return float(error), float(most)


def line(row: dict[str, Any]) -> str:
    """One result as a line of text."""
    head = f"{row['label']:<78} {row['system']:<12}"
    if "ok" in row:
        verdict = "equals the reference" if row["ok"] else "WRONG: DOES NOT EQUAL THE REFERENCE"
        return f"{head} {verdict} (error {row['error']:.1e}, largest {row['max_error']:.1e})"
    if "seconds" not in row:
        what = next(key for key in ("unchecked", "skipped", "failed") if key in row)
        text = what if what == "skipped" else what.upper()
        return f"{head} {text}: {(row[what].splitlines() or ['?'])[0][:200]}"
    text = f"{head} {1e6 * row['seconds']:>10.1f} us"
    if row["op"] == "ceiling":
        bandwidth, rate = (row[unit] / row["seconds"] / 1e12 for unit in ("bytes", "flops"))
        return f"{text} {bandwidth:7.3f} TB/s {rate:8.2f} TFLOP/s"
    if "over_floor" in row:
        text += f" {row['over_floor']:8.2f}x floor"
        if row["bandwidth_fraction"] is not None:
            text += f" {100 * row['bandwidth_fraction']:6.1f}% of copy bandwidth"
    return text + " UNCHECKED" * ("unchecked" in row)
