"""Experiments from config files: `python -m experiments.run experiments/configs/NAME.yaml [key=value ...]`.

Each run adds one JSON line to `experiments/results/runs/NAME.jsonl` (or --output). Runs that the file has already are
not repeated: what was stopped goes on where it was. A simulated run of the same config and seed gives the same line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from experiments.config import Experiment, RunConfig, load_experiment
from experiments.results_file import ResultsFile
from slora_jax import SloraError

RESULTS = Path(__file__).parent / "results" / "runs"


def run_experiment(experiment: Experiment, results: ResultsFile, workers: int = 1, progress: bool = True) -> None:
    """Carries out the runs that `results` lacks, and adds them in order. Ctrl-C keeps what is there.

    workers: processes, of simulated runs. A run that cannot be (it does not fit into memory, say) gives a line with
    the error.
    """
    todo = {run.config.key: run.config for run in experiment.runs if run.config.key not in results}
    done = len({run.config.key for run in experiment.runs}) - len(todo)
    bar = tqdm(total=len(todo) + done, initial=done, desc=experiment.name, unit="run", disable=not progress)
    with bar:
        for config, metrics in _metrics(list(todo.values()), workers):
            results.add(config, metrics)
            bar.update()


def _metrics(configs: Sequence[RunConfig], workers: int) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    simulated = [config for config in configs if config.mode == "simulated"]
    if workers > 1 and len(simulated) > 1:
        with ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent) as pool:
            try:
                yield from zip(simulated, pool.map(_simulated, simulated), strict=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in active_children():  # a run that is under way may take a minute
                    child.terminate()
                raise
    else:
        yield from ((config, _simulated(config)) for config in simulated)
    real = [config for config in configs if config.mode == "real"]
    if real:
        from experiments.runners.real import RealRunner

        with RealRunner() as runner:
            for config in real:
                try:
                    yield config, runner.run(config)
                except SloraError as error:
                    yield config, {"error": str(error)}

    served = [config for config in configs if config.mode == "served"]
    if served:
        from experiments.runners.served import run_served

        for config in served:
            try:
                yield config, run_served(config)
            except SloraError as error:
                yield config, {"error": str(error)}


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _simulated(config: RunConfig) -> dict[str, Any]:
    from experiments.runners.simulated import run_simulated

    try:
        return run_simulated(config)
    except SloraError as error:
        return {"error": str(error)}


def describe(experiment: Experiment) -> str:
    """The resolved config of every run as YAML, and their number."""
    texts = []
    for number, run in enumerate(experiment.runs, 1):
        labels = {name: text for name in ("panel", "curve", "x", "published") if (text := getattr(run, name))}
        texts.append(f"--- # run {number}\n" + yaml.safe_dump(labels | run.config.to_json(), sort_keys=False))
    distinct = len({run.config.key for run in experiment.runs})
    about = "" if experiment.expected_seconds is None else f", about {experiment.expected_seconds:g} s on two cores"
    return "".join(texts) + f"# {experiment.name}: {len(experiment.runs)} points, {distinct} runs{about}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if a run had an error; 2 for a wrong config; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a .yaml or .gin file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="workload.rate=3, seed=[1,2,3]")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the number of runs")
    parser.add_argument("--output", type=Path, help=f"the JSON lines (default: {RESULTS}/NAME.jsonl)")
    parser.add_argument("--fresh", action="store_true", help="forget the lines that are there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of simulated runs")
    args = parser.parse_intermixed_args(argv)
    try:
        experiment = load_experiment(args.config, args.overrides)
        if args.dry_run:
            print(describe(experiment))
            return 0
        with ResultsFile(args.output or RESULTS / f"{experiment.name}.jsonl", fresh=args.fresh) as results:
            run_experiment(experiment, results, args.workers)
            failed = 0
            for run in experiment.runs:
                metrics = results[run.config.key]
                shown = [f"{name} {metrics[name]:.4g}" for name in experiment.metrics if metrics.get(name) is not None]
                failed += "error" in metrics
                at = f"{run.x}={run.config.value(run.x)}"
                print(f"{run.panel:20} {run.curve:16} {at:28} {metrics.get('error') or ', '.join(shown)}")
        print(f"{len(experiment.runs)} points, {failed} with an error; {results.path}")
        return 1 if failed else 0
    except SloraError as error:
        print("experiments.run: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.run: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
