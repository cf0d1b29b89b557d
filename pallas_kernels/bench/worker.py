"""Runs the cases: checks, ceilings, then by importance, within the time there is. See `supervisor` for what watches."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.bench.case import Case, Dispatch, Program, Section, System
from pallas_kernels.bench.ceilings import Ceilings
from pallas_kernels.bench.compilation import compile_here, declined
from pallas_kernels.bench.record import Record
from pallas_kernels.bench.size import Size
from pallas_kernels.bench.supervisor import RESTART
from pallas_kernels.bench.timing import Timing, time_in_turn

RESERVE = 10.0
"""Seconds kept for goals and plots."""

PATIENCE = 60.0
"""Seconds after which a system that has not ended its first dispatches is taken to hang."""

FEWEST_ROUNDS = 3

OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Stage:
    """Cases whose programs are compiled together."""

    name: str
    cases: tuple[tuple[Section, Case], ...]


def stages(sections: Sequence[Section]) -> Iterator[Stage]:
    """Checks first, then the ceilings, then what matters most."""
    pairs = [(section, case) for section in sections for case in section.cases]
    yield Stage("checks", tuple(pair for pair in pairs if pair[1].is_check))
    timed = [pair for pair in pairs if not pair[1].is_check]
    order = sorted(timed, key=lambda pair: (pair[1].importance, [s.name for s in sections].index(pair[0].name)))
    for (importance, name), group in itertools.groupby(order, key=lambda pair: (pair[1].importance, pair[0].name)):
        yield Stage(f"{name}, importance {importance}", tuple(group))


@dataclass
class Worker:
    """Measures into `record` until `deadline` (seconds since the epoch)."""

    size: Size
    record: Record
    deadline: float
    budget: float
    bar: Any = None
    compiled: dict[str, Any] = field(default_factory=dict)

    def run(self, sections: Sequence[Section]) -> None:
        """Every case that has no result yet."""
        self.bar = tqdm(total=sum(len(section.cases) for section in sections), unit="case", file=sys.stderr)
        at: Section | None = None
        for stage in stages(sections):
            self._compile(stage)
            for section, case in stage.cases:
                if at is not None and section is not at:
                    at.release()
                at = section
                self.bar.set_postfix_str(case.label)
                systems = [s for s in case.systems if not self.record.has(case, s.name)]
                if systems:
                    (self._check if case.is_check else self._measure)(section.name, case, systems)
                self.bar.update()
        self.bar.close()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - RESERVE - time.time()

    def _compile(self, stage: Stage) -> None:
        """Compiles what the stage's cases need; whatever goes wrong is found when they are run."""
        wanted: dict[str, Program] = {}
        for section, case in stage.cases:
            for system in case.systems:
                if (
                    system.program
                    and not self._refusal(section.name, case, system)
                    and not self.record.has(case, system.name)
                ):
                    wanted.setdefault(system.program.name, system.program)
        wanted = {name: program for name, program in wanted.items() if name not in self.compiled}
        if not wanted or self.left <= 0:
            return
        limit = 0.7 * self.left  # the rest is for running them
        self.bar.set_postfix_str(f"compiling {len(wanted)} programs: {stage.name}")
        batches = [list(wanted.values())]
        if self.record.data.get("one_by_one"):
            batches = [[program] for program in wanted.values()]
        until = time.time() + limit
        for programs in batches:
            name = programs[0].name if len(programs) == 1 else ""
            self.record.begin("compiling", name, max(0.0, until - time.time()) + PATIENCE)
            for done in compile_here(programs, until - time.time()):
                self.compiled[done.program.name] = done.result
                facts: dict[str, Any] = {"name": done.program.name, "seconds": round(done.seconds, 3)}
                if isinstance(done.result, Exception):
                    facts["skipped" if declined(done.result) else "failed"] = _text(done.result)
                else:
                    facts["temp_bytes"] = done.result.memory_analysis().temp_size_in_bytes
                self.record.data["programs"].append(facts)

    def _refusal(self, section: str, case: Case, system: System) -> str:
        """Why a system is not even tried."""
        checks = () if case.is_check else self._checks(section, case, system)
        if any(check.get("ok") is False or "failed" in check for check in checks):
            return "failed its check"
        return system.skip

    def _checks(self, section: str, case: Case, system: System) -> list[dict[str, Any]]:
        """Results of the checks that speak for a system's results in a timed case."""
        mine = (section, case.regime, system.name)
        return [c for c in self.record.data["checks"] if (c["section"], c["regime"], c["system"]) == mine]

    def _started(self, section: str, case: Case, systems: Sequence[System]) -> dict[str, Dispatch]:
        """Dispatch functions of the systems that could be started; the others get their results here."""
        dispatches = {}
        for system in systems:
            if reason := self._refusal(section, case, system):
                self._note(section, case, system, skipped=reason)
                continue
            program = system.program
            failure = self.record.fatal(case, system.name)
            if program and not failure:
                failure = self.record.data.get("uncompilable", {}).get(program.name, "")
            compiled = self.compiled.get(program.name) if program else None
            if failure:
                self._note(section, case, system, failed=failure)
            elif self.left <= 0 or isinstance(compiled, TimeoutError) or (program and compiled is None):
                self._note(section, case, system, skipped=OUT_OF_TIME)
            elif isinstance(compiled, Exception):
                self._give_up(section, case, system, compiled)
            else:
                self.record.begin(case.label, system.name, PATIENCE)
                try:
                    assert system.start is not None
                    dispatches[system.name] = system.start(compiled)
                except Exception as error:  # noqa: BLE001 - one system must not end the benchmark
                    self._give_up(section, case, system, error)
        return dispatches

    def _check(self, section: str, case: Case, systems: Sequence[System]) -> None:
        """Compares every system's result with the first's, whose own result is not among the checks."""
        reference, *others = case.systems
        others = [system for system in others if system in systems]
        dispatches = self._started(section, case, [reference, *others])
        results = {}
        for name, dispatch in dispatches.items():
            self.record.begin(case.label, name, PATIENCE)
            try:
                results[name] = jax.block_until_ready(dispatch())
            except Exception as error:  # noqa: BLE001 - see above
                self._give_up(section, case, next(s for s in case.systems if s.name == name), error)
        for system in others:
            if system.name in results and reference.name in results:
                off, most = distance(results[system.name], results[reference.name])
                assert case.tolerance is not None
                ok = off <= case.tolerance and most <= 10 * case.tolerance  # NaN is not
                self._note(section, case, system, error=off, max_error=most, tolerance=case.tolerance, ok=ok)
            elif system.name in results:
                self._note(section, case, system, unchecked=f"there is no result of {reference.name!r}")

    def _measure(self, section: str, case: Case, systems: Sequence[System]) -> None:
        # A floor may rest on another system's time, so that one is measured again beside those that are left.
        needed = {system.over for system in systems}
        systems = [s for s in case.systems if s in systems or s.name in needed]
        dispatches = self._started(section, case, systems)
        if not dispatches:
            return
        share = max(0.0, self.left) / self.budget
        rounds = max(FEWEST_ROUNDS, round(2 * share * self.size.rounds))  # all of them during the first half
        results = time_in_turn(
            dispatches, rounds=min(rounds, self.size.rounds), round_seconds=self.size.round_seconds,
            begin=lambda name: self.record.begin(case.label, name, PATIENCE),
        )  # fmt: skip
        ceilings = Ceilings.of(self.record.data["rows"])
        for system in systems:
            match results.get(system.name):
                case Timing() as timing:
                    base = results.get(system.over)
                    over = base.seconds if isinstance(base, Timing) else 0.0
                    numbers = _numbers(case, system, timing, ceilings, over)
                    if any("unchecked" in check for check in self._checks(section, case, system)):
                        numbers["unchecked"] = True
                    self._note(section, case, system, **numbers)
                case Exception() as error:
                    self._give_up(section, case, system, error)

    def _give_up(self, section: str, case: Case, system: System, error: Exception) -> None:
        """Records what was raised. Ends the process where the device does not work any more."""
        if reason := declined(error):
            self._note(section, case, system, skipped=reason)
            return
        self._note(section, case, system, failed=_text(error))
        try:
            jax.block_until_ready(jnp.zeros(1) + 1)
        except Exception:  # noqa: BLE001 - whatever it is, nothing will work here
            self.record.data.pop("under_way", None)
            self.record.save()
            os._exit(RESTART)

    def _note(self, section: str, case: Case, system: System, **results: Any) -> None:
        if self.record.has(case, system.name):
            return
        row = self.record.add(case, system.name, section=section, importance=case.importance, **results)
        tqdm.write(line(row), file=sys.stdout)


def _numbers(case: Case, system: System, timing: Timing, ceilings: Ceilings | None, over: float) -> dict[str, Any]:
    """A row's numbers. over: seconds that the floor begins with."""
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
    if ceilings and case.op != "ceiling":
        floor = over + work.seconds(ceilings.bandwidth, ceilings.matmul_flops)
        numbers |= {"floor_seconds": floor, "over_floor": seconds / floor}
        numbers["bandwidth_fraction"] = work.bytes / (seconds - over) / ceilings.bandwidth if seconds > over else None
    return numbers


def distance(result: Any, reference: Any) -> tuple[float, float]:
    """The norm of the difference over the reference's norm, and its greatest element over the reference's RMS: of the
    worst of the arrays. NaN anywhere gives NaN."""
    errors = []
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True):
        a, b = (jnp.asarray(x).astype(jnp.float32) for x in (ours, theirs))
        rms = jnp.sqrt(jnp.mean(b * b))
        errors.append([jnp.sqrt(jnp.mean((a - b) ** 2)) / rms, jnp.max(jnp.abs(a - b)) / rms])
    error, most = np.max(np.array(errors, np.float64), axis=0)
    return float(error), float(most)


def line(row: dict[str, Any]) -> str:
    """A result for people."""
    head = f"{row['label']:<78} {row['system']:<12}"
    if "ok" in row:
        verdict = "equals the reference" if row["ok"] else "WRONG: DOES NOT EQUAL THE REFERENCE"
        return f"{head} {verdict} (error {row['error']:.1e}, largest {row['max_error']:.1e})"
    if "unchecked" in row and "seconds" not in row:
        return f"{head} UNCHECKED: {row['unchecked']}"
    if "seconds" not in row:
        what = "skipped" if "skipped" in row else "FAILED"
        return f"{head} {what}: {(row.get('skipped') or row.get('failed') or '?').splitlines()[0][:200]}"
    text = f"{head} {1e6 * row['seconds']:>10.1f} us"
    if row["op"] == "ceiling":
        bandwidth, rate = (row[unit] / row["seconds"] / 1e12 for unit in ("bytes", "flops"))
        return f"{text} {bandwidth:7.3f} TB/s {rate:8.2f} TFLOP/s"
    if "over_floor" in row:
        text += f" {row['over_floor']:8.2f}x floor"
        if row["bandwidth_fraction"] is not None:
            text += f" {100 * row['bandwidth_fraction']:6.1f}% of copy bandwidth"
    return text + " UNCHECKED" * ("unchecked" in row)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
