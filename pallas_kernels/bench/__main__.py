"""Measures every op against its roofline on this machine's GPU: `python -m pallas_kernels.bench`.

Each kernel is first compared with the XLA reference; then the device's copy bandwidth and matrix rate are measured,
then every op in decode and prefill shapes. Results go to a JSON file after every case; plots beside it at the end.
`python -m experiments.kernel_bench` adds whole decode steps of Llama-3-8B. On a CPU a miniature of it all runs, whose
numbers mean nothing. The package's docstring says how time is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pallas_kernels.bench.goals import goals
from pallas_kernels.bench.plot import plot
from pallas_kernels.bench.record import Record, provenance
from pallas_kernels.bench.supervisor import supervise, worker_environment

SECTIONS = ("ceilings", "lora", "attention", "pool_write")
DEVICES = ("h200", "a100", "l4")
More = Mapping[str, Callable[[Any, int], Any]]
"""Further sections by name: `(Size, seed) -> Section`."""


def main(
    argv: Sequence[str] | None = None, *, program: str = "pallas_kernels.bench", more: More = MappingProxyType({})
) -> int:
    """Runs the command; `python -m PROGRAM` must run it with the same sections.

    Returns:
      Exit status. 0: nothing failed. 1: a check or a case failed, or there was no end. 2: wrong arguments.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser(program, more).parse_args(arguments)
    if args.list or args.compile_only:  # before JAX is imported
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    args.out = args.out or Path(f"compile_{args.compile_only}.json" if args.compile_only else "bench.json")
    if args.list:
        return _list(args, more)
    if args.compile_only:
        return _compile_only(args, more)
    if args.worker:
        return _work(args, program, more)
    deadline = time.time() + args.budget_seconds
    args.out.unlink(missing_ok=True)
    command = [sys.executable, "-m", program, *arguments, "--worker", repr(deadline)]
    reason = supervise(command, args.out, deadline, worker_environment(args.miniature))
    if not args.out.exists():
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 1
    return _finish(args.out, reason)


def _parser(program: str, more: More) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description="Measures every op against its roofline on this machine's GPU."
    )
    parser.add_argument(
        "--out", type=_file, help="results (replaced; bench.json, or compile_DEVICE.json); plots lie beside it"
    )
    parser.add_argument(
        "--budget-seconds", type=_positive, default=450.0, help="in all; least important cases go first"
    )
    parser.add_argument(
        "--only", choices=(*SECTIONS, *more), action="append", help="sections (several: repeat); ceilings always"
    )
    parser.add_argument("--match", type=_pattern, default=re.compile(""), metavar="REGEX", help="cases by their label")
    parser.add_argument("--seed", type=_seed, default=0, help="of inputs and page numbers")
    parser.add_argument("--miniature", action="store_true", help="tiny shapes, interpreted kernels")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the cases and run none")
    mode.add_argument("--compile-only", choices=DEVICES, help="compile every program for a GPU that is not there")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # deadline
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer in 0..2^31-1")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    if new:
        path.unlink()
    return path


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _sections(args: argparse.Namespace, miniature: bool, more: More) -> list[Any]:
    """The sections and cases that were asked for; the ceilings are always among them."""
    import dataclasses

    from pallas_kernels.bench import ceilings
    from pallas_kernels.bench.size import FULL, MINIATURE
    from pallas_kernels.lora import bench as lora
    from pallas_kernels.paged_attention import bench as attention
    from pallas_kernels.pool_write import bench as pool_write

    modules = zip(SECTIONS, (ceilings, lora, attention, pool_write), strict=True)
    chosen = []
    for name, make in ({name: module.section for name, module in modules} | dict(more)).items():
        if name != "ceilings" and args.only and name not in args.only:
            continue
        section = make(MINIATURE if miniature else FULL, args.seed)
        if name != "ceilings":
            section = dataclasses.replace(section, cases=[c for c in section.cases if args.match.search(c.label)])
        chosen.append(section)
    if not any(section.cases for section in chosen[1:]) and args.only != ["ceilings"]:
        raise SystemExit(f"--match {args.match.pattern!r}: no case of that label; --list shows them")
    return chosen


def _list(args: argparse.Namespace, more: More) -> int:
    for section in _sections(args, args.miniature, more):
        for case in section.cases:
            print(f"{section.name:<11} {case.importance:>2}  {case.label}: {', '.join(s.name for s in case.systems)}")
    return 0


def _compile_only(args: argparse.Namespace, more: More) -> int:
    """Compiles, for a GPU that is not there, the programs of all cases asked for."""
    from pallas_kernels.bench.compilation import compile_for_absent, declined
    from pallas_kernels.devices import DEVICES, compiling_for

    record = Record(args.out)
    record.data |= {"command": shlex.join(sys.argv), "compiled_for": args.compile_only}
    device = DEVICES[args.compile_only]
    with compiling_for(device):
        sections = _sections(args, args.miniature, more)
        systems = [s for section in sections for case in section.cases for s in case.systems]
    programs = {s.program.name: s.program for s in systems if s.program}
    count = dict.fromkeys(("compiled", "skipped", "failed"), 0)
    for done in compile_for_absent(programs.values(), device):
        facts: dict[str, Any] = {"name": done.program.name, "seconds": round(done.seconds, 2)}
        text = f"{done.program.name:<60} {done.seconds:6.1f} s"
        what = "compiled"
        if isinstance(done.result, Exception):
            what = "skipped" if declined(done.result) else "failed"
            facts[what] = f"{type(done.result).__name__}: {done.result}"
            text += f" {what}: {facts[what].splitlines()[0][:200]}"
        else:
            facts["temp_bytes"] = done.result.memory_analysis().temp_size_in_bytes
            text += f" {facts['temp_bytes'] / 2**20:10.1f} MiB of temporaries"
        count[what] += 1
        print(text, flush=True)
        record.data["programs"].append(facts)
        record.save()
    record.data["finished"] = True
    record.save()
    print(f"{args.compile_only}: " + ", ".join(f"{number} {what}" for what, number in count.items()))
    return int(count["failed"] > 0)


def _work(args: argparse.Namespace, program: str, more: More) -> int:
    """The measuring process."""
    import jax

    from pallas_kernels.bench.size import FULL, MINIATURE
    from pallas_kernels.bench.worker import Worker

    miniature = args.miniature or jax.default_backend() != "gpu"
    if miniature and not args.miniature:
        print("no GPU is here: a miniature runs, whose numbers mean nothing")
    sections = _sections(args, miniature, more)
    record = Record(args.out, resume=args.resume)
    if not args.resume:
        record.data |= {
            "command": shlex.join(["python", "-m", program, *sys.argv[1:-2]]),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "miniature": miniature,
            "budget_seconds": args.budget_seconds,
            "provenance": provenance(),
        }
    size = MINIATURE if miniature else FULL
    Worker(size, record, args.worker, args.budget_seconds).run(sections)
    sys.stdout.flush()
    record.data.pop("under_way", None)
    record.data["finished"] = True
    record.save()  # from here on this process may be ended
    return 0


def _finish(path: Path, reason: str) -> int:
    """Goals, plots and what went wrong."""
    record = Record(path, resume=True)
    data = record.data
    data["goals"] = goals([] if data.get("miniature") else data["rows"])
    if reason:
        data["ended_early"] = reason
    record.save()
    try:
        plots = ", ".join(path.name for path in plot(data, path))
    except Exception as error:  # noqa: BLE001 - the results are there without them
        plots = f"no plots: {error}"
    wrong = [row for row in data["checks"] if row.get("ok") is False or "unchecked" in row]
    failed = [row for row in data["checks"] + data["rows"] if "failed" in row]
    skipped = [row for row in data["checks"] + data["rows"] if "skipped" in row]
    for title, rows in (("WRONG, OR UNCHECKED", wrong), ("FAILED", failed), ("skipped", skipped)):
        if rows:
            print(f"\n{title} ({len(rows)})")
        for row in rows:
            print(f"  {row['label']}: {row['system']}: {str(row.get('failed', row.get('skipped', '')))[:160]}")
    print("\ngoals")
    for goal in data["goals"]:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        print(f"  {verdict:<13} {goal['goal']}: {goal['measured']}")
    print(f"\n{path}; {plots}")
    if reason:
        print(f"the benchmark did not come to its end: {reason}", file=sys.stderr)
    return int(bool(wrong or failed or reason))


if __name__ == "__main__":
    sys.exit(main())
