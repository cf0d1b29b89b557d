"""Measures every op, and whole steps, against their rooflines: `python -m experiments.kernel_bench`.

Every section (the device's own rates first, then each op, then the steps) runs in a process of its own. Results go to a
JSON file as they are measured, plots beside it at the end. Without a GPU a miniature runs, whose numbers mean nothing.
`pallas_kernels.bench` says how time is measured; `pallas_kernels.prediction`, what `--predict` computes instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.kernel_bench.goals import goals
from experiments.kernel_bench.plot import plot
from experiments.machine import provenance
from pallas_kernels.bench.record import BROKEN_DEVICE, Record

SHARES = {"ceilings": 2, "lora": 6, "attention": 4, "experts": 2, "pool_write": 1, "sampler": 1, "step": 4}
"""Sections in their order, and their parts of the time limit. A section leaves the rest of its part to the others."""
DEVICES = ("h200", "a100", "l4")
RESERVE = 10.0
"""Seconds kept for goals and plots, and until a process that is past its deadline is killed."""
MOST_PROCESSES = 10
"""Of a section: one more for each system that kills its process."""
PROGRAM = "experiments.kernel_bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Exit status. 0: nothing failed. 1: a check or a case failed, or a section ended early. 2: wrong arguments.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    if args.list or args.compile_only or args.compiled or args.predict:  # before JAX is imported
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    modes = {f"compile_{args.compile_only}": args.compile_only, f"predict_{args.predict}": args.predict}
    args.out = args.out or Path(next((name for name, chosen in modes.items() if chosen), "bench") + ".json")
    if args.list:
        for name, cases in _sections(args, args.miniature).items():
            for case in cases:
                systems = ", ".join(system.name for system in case.systems)
                print(f"{name:<11} {case.importance:>2}  {case.label}: {systems}")
        return 0
    if args.compiled:
        from experiments.kernel_bench import compiled
        from pallas_kernels.devices import DEVICES as BY_NAME

        print(compiled.table(compiled.update(BY_NAME[args.compiled])))
        return 0
    if args.predict:
        return _predict(args, shlex.join(["python", "-m", PROGRAM, *arguments]))
    if args.section:
        return _measure(args)
    args.out.unlink(missing_ok=True)
    record = Record(args.out)
    record.data["command"] = shlex.join(["python", "-m", PROGRAM, *arguments])
    if args.compile_only:
        return _compile_only(args, record)
    record.data["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    record.data["budget_seconds"] = args.budget_seconds
    record.save()
    environment = _environment(args.miniature)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process leaves the GPU to the measuring ones
    _sections(args, environment.get("JAX_PLATFORMS") == "cpu")  # a wrong --match ends here
    shares = {name: share for name, share in SHARES.items() if _chosen(name, args)}
    end = time.time() + args.budget_seconds - RESERVE
    for number, (name, share) in enumerate(shares.items()):
        rest = sum(list(shares.values())[number:])
        command = [sys.executable, "-m", PROGRAM, *arguments, "--section", name]
        run_section(command, args.out, time.time() + (end - time.time()) * share / rest, environment)
    return _finish(args.out)


def run_section(command: Sequence[str], path: Path, deadline: float, environment: dict[str, str]) -> None:
    """Runs `command --deadline DEADLINE`, which measures a section into the `Record` at `path`.

    If the process dies or hangs, what was running (a system, or all systems of a case) has failed, and a new process
    measures the rest. If no system was running, the section ends early, and the results say why.
    """
    budget = max(1.0, deadline - time.time())
    for _ in range(MOST_PROCESSES):
        reason = "past its deadline"
        try:
            timeout = max(0.0, deadline - time.time()) + RESERVE
            done = subprocess.run(
                [*command, "--deadline", repr(deadline), "--budget-seconds", repr(budget)],
                env=environment, timeout=timeout, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return
            code = done.returncode
            reason = f"died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        record = Record(path)
        if time.time() > (record.data.get("under_way") or {}).get("until", float("inf")):
            reason = "hung"
        if (not record.fail_under_way(reason) and code != BROKEN_DEVICE) or time.time() > deadline:
            break
        print(f"the measuring process ended: {reason}; another measures the remaining systems", flush=True)
    record.data.setdefault("ended_early", {})[command[-1]] = reason
    record.save()


def _environment(miniature: bool) -> dict[str, str]:
    """Environment of a measuring process: most of the GPU's memory for JAX, few logs, a CUDA toolkit; without a GPU or
    for a miniature, the CPU, with programs that compile fast. `JAX_PLATFORMS` is the user's if set."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ
    toolkit = next((path.parents[1] for path in _assemblers()), None)
    if toolkit:
        environment.setdefault("CUDA_ROOT", str(toolkit))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if miniature or not (has_gpu or environment.get("JAX_PLATFORMS", "cpu") != "cpu"):
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return environment


def _assemblers() -> Iterator[Path]:
    """Paths of `ptxas`, those in Python packages first. JAX looks into one package only, where it may be missing."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        with suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(package)
            yield from (path for root in (spec and spec.submodule_search_locations) or () for path in _ptxas(root))
    yield from _ptxas("/usr/local/cuda")


def _ptxas(root: str) -> list[Path]:
    path = Path(root, "bin", "ptxas")
    return [path] if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description="Measures every op against its roofline.")
    add = parser.add_argument
    add("--out", type=_file, help="results file (default: {bench,compile_DEVICE,predict_DEVICE}.json); plots beside it")
    add("--budget-seconds", type=_positive, default=450.0, help="time limit; the least important cases are dropped")
    add("--only", choices=SHARES, action="append", help="sections (repeatable); ceilings always run")
    add("--match", type=_pattern, default=re.compile(""), metavar="REGEX", help="select cases by label")
    add("--systems", type=_pattern, default=re.compile(""), metavar="REGEX", help="select systems by name")
    add("--most-importance", type=int, default=2, metavar="N", help="leave out cases of a higher number, see --list")
    add("--seed", type=_seed, default=0, help="seed of inputs and page numbers")
    add("--miniature", action="store_true", help="tiny shapes, interpreted kernels")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the cases and run none")
    mode.add_argument(
        "--compiled", choices=DEVICES, help="print a table of the kernels compiled for a GPU; none is needed"
    )
    mode.add_argument("--compile-only", choices=DEVICES, help="compile every program for a GPU that need not be here")
    mode.add_argument("--predict", choices=DEVICES, help="predict the times of the cases; nothing is compiled or run")
    add("--section", help=argparse.SUPPRESS)  # of a measuring process, like the next
    add("--deadline", type=float, help=argparse.SUPPRESS)  # seconds since the epoch
    return parser


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: must be an integer in 0..2^31-1")


def _file(text: str) -> Path:
    path = Path(text)
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: cannot be written: {error.strerror}") from error
    if new:
        path.unlink()
    return path


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: is not a regular expression: {error}") from error


def _chosen(name: str, args: argparse.Namespace) -> bool:
    return name == (args.section or name) and (name == "ceilings" or not args.only or name in args.only)


def _sections(args: argparse.Namespace, miniature: bool) -> dict[str, list[Any]]:
    """The chosen cases by section; ceilings are always among them."""
    from experiments.kernel_bench import sampler, step
    from pallas_kernels.bench import ceilings
    from pallas_kernels.bench.size import FULL, MINIATURE
    from pallas_kernels.experts import bench as experts
    from pallas_kernels.lora import bench as lora
    from pallas_kernels.paged_attention import bench as attention
    from pallas_kernels.pool_write import bench as pool_write

    size = MINIATURE if miniature else FULL
    modules = dict(zip(SHARES, (ceilings, lora, attention, experts, pool_write, sampler, step), strict=True))
    sections = {name: module.section(size, args.seed) for name, module in modules.items() if _chosen(name, args)}
    for name in sections.keys() - {"ceilings"}:
        found = (_of_systems(case, args.systems) for case in sections[name] if args.match.search(case.label))
        sections[name] = [case for case in found if case.systems and case.importance <= args.most_importance]
    if not args.section and args.only != ["ceilings"] and not any(list(sections.values())[1:]):
        raise SystemExit(f"--match {args.match.pattern!r}: no case has such a label; --list prints them")
    return sections


def _of_systems(case: Any, wanted: re.Pattern[str]) -> Any:
    """The case with the systems of these names, and those that they need: a check's reference, or another's time."""
    kept = [system for system in case.systems if wanted.search(system.name)]
    needed = {system.over for system in kept} | ({case.systems[0].name} if kept and case.is_check else set())
    return replace(case, systems=tuple(s for s in case.systems if s in kept or s.name in needed))


def _compile_only(args: argparse.Namespace, record: Record) -> int:
    """Compiles the programs of the chosen cases for a GPU that need not be present."""
    from pallas_kernels.bench.compilation import compile_program
    from pallas_kernels.devices import DEVICES, compiling_for

    record.data["compiled_for"] = args.compile_only
    device = DEVICES[args.compile_only]
    with compiling_for(device):
        sections = _sections(args, args.miniature)
    systems = [s for cases in sections.values() for case in cases for s in case.systems]
    count = dict.fromkeys(("compiled", "skipped", "failed"), 0)
    for program in {s.program.name: s.program for s in systems if s.program}.values():
        facts = compile_program(program, device).facts()
        what = next((key for key in ("skipped", "failed") if key in facts), "compiled")
        size = f"{facts['temp_bytes'] / 2**20:10.1f} MiB of temporaries" if what == "compiled" else ""
        why = size or f"{what}: {facts[what].splitlines()[0][:200]}"
        print(f"{program.name:<60} {facts['seconds']:6.1f} s {why}", flush=True)
        count[what] += 1
        record.data["programs"].append(facts)
        record.save()
    record.data["finished"] = True
    record.save()
    print(f"{args.compile_only}: " + ", ".join(f"{number} {what}" for what, number in count.items()))
    return int(count["failed"] > 0)


def _predict(args: argparse.Namespace, command: str) -> int:
    """Prints the floor, the prediction and its bound for every chosen case, and writes them to the results file."""
    from pallas_kernels.bench.predict import Predictor, table
    from pallas_kernels.bench.size import FULL, MINIATURE
    from pallas_kernels.prediction import COPY_SHARE, MATMUL_SHARE
    from pallas_kernels.targets import TARGETS

    cases = [case for section in _sections(args, args.miniature).values() for case in section]
    target = TARGETS[args.predict]
    rows = list(Predictor(MINIATURE if args.miniature else FULL, target).rows(cases))
    assumed = {"copy_share": COPY_SHARE, "matmul_share": MATMUL_SHARE}
    content = {"command": command, "predicted_for": target.name, "assumed": assumed, "rows": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{target.name}: predictions, not measurements\n{table(rows)}")
    return 0


def _measure(args: argparse.Namespace) -> int:
    """A measuring process: one section."""
    import jax

    from pallas_kernels.bench.measure import Measurement
    from pallas_kernels.bench.size import FULL, MINIATURE

    record = Record(args.out)
    miniature = args.miniature or jax.default_backend() != "gpu"
    if "provenance" not in record.data:
        record.data |= {"miniature": miniature, "provenance": _provenance()}
        if miniature and not args.miniature:
            print("there is no GPU: a miniature runs, whose numbers mean nothing")
    size, cases = MINIATURE if miniature else FULL, _sections(args, miniature)[args.section]
    Measurement(args.section, size, record, args.deadline, args.budget_seconds).run(cases)
    record.data.pop("under_way", None)
    record.save()
    sys.stdout.flush()
    os._exit(0)  # without waiting for programs that still compile


def _provenance() -> dict[str, Any]:
    """Machine, device, driver, versions, revision, date. Starts JAX's backend."""
    import jax

    cuda = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name)]
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    driver = ""
    with suppress(OSError, subprocess.SubprocessError):
        smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        driver = smi.stdout.strip()
    device = jax.devices()[0]
    return provenance(("jax", "jaxlib", "flax", "numpy", *cuda)) | {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": driver,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _finish(path: Path) -> int:
    """Adds goals and plots, and prints what failed."""
    record = Record(path)
    data, early = record.data, record.data.get("ended_early", {})
    data["goals"] = goals([] if data.get("miniature") else data["rows"])
    data["finished"] = not early
    record.save()
    try:
        plots = ", ".join(path.name for path in plot(data, path))
    except Exception as error:  # noqa: BLE001 - the results are complete without plots
        plots = f"no plots: {error}"
    results = data["checks"] + data["rows"]
    wrong = [row for row in data["checks"] if row.get("ok") is False or "unchecked" in row]
    failed, skipped = ([row for row in results if key in row] for key in ("failed", "skipped"))
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
    for name, reason in early.items():
        print(f"section {name} ended early: {reason}", file=sys.stderr)
    return int(bool(wrong or failed or early))


if __name__ == "__main__":
    sys.exit(main())
