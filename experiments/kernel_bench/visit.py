"""A short visit to a GPU, in calls that are each useful if they are the last.

`python -m experiments.kernel_bench.visit N` makes call N.
Call 1 (4 minutes): the device's own rates, checks of the Triton kernels, the goals' cases, and one profile of shrink.
Call 2 (5 minutes): whole steps, the sampler, and writes into the pool. Call 3 (2 minutes): prefill attention in
Mosaic GPU beside Triton. Compiled programs are kept in one file, which the next call unpacks, also on another machine.
`--rehearse` runs the same commands as miniatures on this machine's CPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

BENCHMARK = "experiments.kernel_bench"
CALLS = {
    1: (240.0, ("--only lora --only attention --systems ^triton$ --most-importance 0",)),
    2: (300.0, ("--only step --only sampler --only pool_write",)),
    3: (120.0, ("--only attention --match 'attention prefill' --systems ^(triton|mosaic_gpu)$",)),
}
"""Seconds of each call, and the benchmark's arguments."""
PROFILED = "--only lora --match 'lora_shrink decode .*rows=64 adapters=64 rank=16' --systems ^triton$"
PROFILE_SECONDS = 60.0
CACHE = "compiled_programs.tar"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the first exit status of the benchmark that is not 0, or 0."""
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cache = args.out / "compiled_programs"
    archive = args.cache or args.out / CACHE
    if archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(cache, filter="data")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    seconds, runs = CALLS[args.call]
    end, status = time.monotonic() + seconds, 0
    for number, run in enumerate(runs):
        left = (end - time.monotonic()) / (len(runs) - number)
        out = args.out / f"call{args.call}{f'_{number}' * (number > 0)}.json"
        status = _run(run, ["--budget-seconds", f"{left:.0f}", "--out", str(out)], args.rehearse, environment) or status
    _pack(cache, archive)  # before the profile, which a driver may refuse
    if args.call == 1 and not args.rehearse and (ncu := shutil.which("ncu")):
        prefix = [ncu, "--set", "full", "--kernel-name", "regex:lora_shrink", "--launch-count", "3"]
        prefix += ["--target-processes", "all", "--force-overwrite", "--export", str(args.out / "shrink")]
        rest = ["--budget-seconds", f"{PROFILE_SECONDS:.0f}", "--out", str(args.out / "profiled.json")]
        _run(PROFILED, rest, False, environment, prefix)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {BENCHMARK}.visit", description="A short visit to a GPU.")
    parser.add_argument("call", type=int, choices=CALLS, help="which call")
    parser.add_argument("--out", type=Path, default=Path("build/visit"), help="directory of results")
    parser.add_argument("--cache", type=Path, help=f"file of compiled programs (default: {CACHE} in --out)")
    parser.add_argument("--rehearse", action="store_true", help="run the same commands as miniatures on the CPU")
    return parser


def _run(
    arguments: str, more: Sequence[str], rehearse: bool, environment: dict[str, str], prefix: Sequence[str] = ()
) -> int:
    """Runs the benchmark. Returns its exit status."""
    command = [*prefix, sys.executable, "-m", BENCHMARK, *shlex.split(arguments), *more, *["--miniature"] * rehearse]
    print(shlex.join(command), flush=True)
    return subprocess.run(command, env=environment, check=False).returncode


def _pack(directory: Path, archive: Path) -> None:
    if directory.exists():
        with tarfile.open(archive, "w") as file:
            file.add(directory, ".")


if __name__ == "__main__":
    sys.exit(main())
