"""Experiments from config files: `python -m experiments.run experiments/configs/NAME.yaml [key=value ...]`.

Each run adds one JSON line to `experiments/results/runs/NAME.jsonl` (or --output). Runs that the file already has are
not repeated, so a stopped experiment continues. A simulated run of the same config and seed gives the same line. Runs
with a section `measured` are measured side by side, panel by panel, in rounds.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from experiments.config import Experiment, Run, RunConfig, load_experiment
from experiments.results_file import ResultsFile
from experiments.rounds import side_by_side
from slora_jax import ConfigError, SloraError
from slora_jax.typed import nearest

RESULTS = Path(__file__).parent / "results" / "runs"


def run_experiment(
    experiment: Experiment, results: ResultsFile, workers: int = 1, progress: bool = True, note: str = ""
) -> None:
    """Carries out the runs that `results` lacks, and adds them in order. Ctrl-C keeps the finished ones.

    A run that cannot be carried out (it does not fit into memory, say) gives a line with the error.

    Args:
      workers: processes for simulated runs.
      note: kept in the lines of measured runs.
    """
    todo = {run.config.key: run.config for run in experiment.runs if run.config.key not in results}
    panels: dict[str, dict[str, Run]] = {}
    for run in experiment.runs:
        if _is_measured(run.config):
            panels.setdefault(run.panel, {})[run.config.key] = run
    plain = [config for config in todo.values() if not _is_measured(config)]
    done = len({run.config.key for run in experiment.runs}) - len(todo)
    bar = tqdm(total=len(todo) + done, initial=done, desc=experiment.name, unit="run", disable=not progress)
    with bar:
        for config, metrics in _metrics(plain, workers):
            results.add(config, metrics)
            bar.update()
        with closing(_Runners()) as runners:
            for panel, runs in panels.items():
                if not todo.keys() & runs.keys():  # rounds are of all runs of the panel
                    continue
                for run, line in zip(runs.values(), runners.measure(list(runs.values())), strict=True):
                    results.add(run.config, **line, panel=panel, curve=run.curve, **({"note": note} if note else {}))
                    bar.update()


def _is_measured(config: RunConfig) -> bool:
    return config.measured is not None or config.mode in ("load_test", "replicas")


class _Runners:
    """The runners of measured panels: one for the whole experiment in the modes that start servers; in mode "real" one
    for each panel, whose systems are in memory together."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._stack = ExitStack()
        self.close = self._stack.close

    def measure(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Returns the results of a panel, as `side_by_side`. Raises PoolError if an engine has lost pages."""
        mode = runs[0].config.mode
        if mode == "real":
            from experiments.runners.real import RealRunner

            with closing(RealRunner([run.config for run in runs])) as runner:
                found = side_by_side(runs, runner.measure)
                runner.check()
                return found
        if mode not in self._made:
            self._made[mode] = self._stack.enter_context(closing(self._make(mode)))
        return side_by_side(runs, self._made[mode].measure, warm_up=False, order=self._made[mode].order)

    def _make(self, mode: str) -> Any:
        if mode == "load_test":
            from experiments.serving.load_test import LoadTest

            return LoadTest()
        from experiments.serving.replicas import ReplicasRunner

        return ReplicasRunner()


def _metrics(configs: Sequence[RunConfig], workers: int) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    simulated = [config for config in configs if config.mode == "simulated"]
    if workers > 1 and len(simulated) > 1:
        with ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent) as pool:
            try:
                yield from zip(simulated, pool.map(_simulated, simulated), strict=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in active_children():  # a run in progress may take a minute
                    child.terminate()
                raise
    else:
        yield from ((config, _simulated(config)) for config in simulated)
    real = [config for config in configs if config.mode == "real"]
    if real:
        from experiments.runners.real import RealRunner

        with closing(RealRunner()) as runner:
            yield from ((config, _or_error(runner.run, config)) for config in real)
    served = [config for config in configs if config.mode == "served"]
    if served:
        from experiments.runners.served import run_served

        yield from ((config, _or_error(run_served, config)) for config in served)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _simulated(config: RunConfig) -> dict[str, Any]:
    from experiments.runners.simulated import run_simulated

    return _or_error(run_simulated, config)


def _or_error(carry_out: Callable[[RunConfig], dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    try:
        return carry_out(config)
    except SloraError as error:
        return {"error": str(error)}


def describe(experiment: Experiment) -> str:
    """Returns the resolved config of every run as YAML, and the number of runs."""
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
    parser.add_argument("--panel", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the number of runs")
    parser.add_argument("--output", type=Path, help=f"JSON lines (default: {RESULTS}/NAME.jsonl)")
    parser.add_argument("--picture", type=Path, help="also draw the results: a .png or .svg file")
    parser.add_argument("--fresh", action="store_true", help="drop the lines of --output")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes for simulated runs")
    parser.add_argument("--note", default="", help="about the machine during the run; kept with measured runs")
    args = parser.parse_intermixed_args(argv)
    try:
        experiment = _only(args.panel, load_experiment(args.config, args.overrides))
        if args.dry_run:
            print(describe(experiment))
            return 0
        with ResultsFile(args.output or RESULTS / f"{experiment.name}.jsonl", fresh=args.fresh) as results:
            run_experiment(experiment, results, args.workers, note=args.note)
            failed = 0
            for run in experiment.runs:
                line = results.lines[run.config.key]
                failed += "error" in line["metrics"] or bool(line.get("problems"))
                print(_row(run, line, experiment.metrics))
                for problem in line.get("problems", ()):
                    print(f"experiments.run: {run.curve}: {problem}", file=sys.stderr)
        print(f"{len(experiment.runs)} points, {failed} with an error; {results.path}")
        if args.picture:
            from experiments.report.collect import collect
            from experiments.report.pictures import picture

            args.picture.write_bytes(picture(collect(experiment, results.lines), kind=args.picture.suffix[1:]))
        return 1 if failed else 0
    except SloraError as error:
        print("experiments.run: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.run: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _only(panels: Sequence[str], experiment: Experiment) -> Experiment:
    """Returns the experiment without the runs of other panels; the whole one if none is named. Raises ConfigError if it
    has no panel of a name."""
    there = list(dict.fromkeys(run.panel for run in experiment.runs))
    for panel in panels:
        if panel not in there:
            raise ConfigError(f"--panel {panel!r} is unknown{nearest(panel, there)}; there are {there}")
    return replace(experiment, runs=tuple(run for run in experiment.runs if not panels or run.panel in panels))


def _row(run: Run, line: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns a run in a line of text: its metrics `names`, and these over the reference's."""
    metrics = line["metrics"]
    shown = [f"{name} {metrics[name]:.4g}" for name in names if metrics.get(name) is not None]
    if (over := line.get("over")) is not None:
        ratios = [f"{name} {over['ratios'][name]:.3g}" for name in names if name in over["ratios"]]
        shown.append(f"over {over['curve']}, {over['x']}: {', '.join(ratios)}")
    if "same_tokens" in line:
        shown.append("{} of {} requests with the same tokens".format(*line["same_tokens"]))
    at = f"{run.x}={run.config.value(run.x)}"
    return f"{run.panel:20} {run.curve:16} {at:28} {metrics.get('error') or ', '.join(shown)}"


if __name__ == "__main__":
    sys.exit(main())
