"""Every table and figure of the paper, and experiments beyond it: `python -m experiments.report`, or `make paper`.

Carries out the simulated runs of `experiments/configs/paper` and `experiments/configs/beyond` that `--output` lacks,
and takes the engine's results from `experiments/results/miniature` (`make miniature` measures them). Writes JSON lines,
a PNG and an SVG per figure, and `report.html`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import load_experiment
from experiments.machine import provenance
from experiments.report.collect import Collected, collect
from experiments.report.page import page
from experiments.report.pictures import picture
from experiments.results_file import ResultsFile, read_results
from experiments.run import run_experiment
from slora_jax import SloraError

EXPERIMENTS = Path(__file__).parents[1]
CONFIGS = EXPERIMENTS / "configs"
MINIATURE = EXPERIMENTS / "results" / "miniature"
ORDER = ("table_3", "figure_5", "figure_6", "figure_7", "figure_8", "figure_9", "figure_10", "tables_4_5")
"""The order of the paper's; the others follow by name."""


def simulated(folder: str, output: Path, workers: int) -> list[Collected]:
    """Carries out the runs of a folder's configs that `output` lacks."""
    files = sorted((CONFIGS / folder).glob("*.yaml"), key=_place)
    made = []
    for file in files:
        experiment = load_experiment(file)
        path = output / folder / f"{experiment.name}.jsonl"
        with ResultsFile(path) as results:
            run_experiment(experiment, results, workers)
        collected = collect(experiment, read_results(path))
        for kind in ("png", "svg"):
            path.with_suffix(f".{kind}").write_bytes(picture(collected, kind=kind))
        made.append(collected)
    return made


def miniature() -> list[Collected]:
    """Returns the results in miniature, measured on the engine."""
    made = []
    for file in sorted((CONFIGS / "miniature").glob("*.yaml"), key=_place):
        experiment = load_experiment(file)
        path = MINIATURE / f"{experiment.name}.jsonl"
        if path.is_file():
            made.append(collect(experiment, read_results(path)))
    return made


def _place(file: Path) -> tuple[int, str]:
    return (ORDER.index(file.stem) if file.stem in ORDER else len(ORDER), file.stem)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a wrong config, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/paper"), help="directory (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    try:
        paper, beyond = (simulated(folder, args.output, args.workers) for folder in ("paper", "beyond"))
        about = provenance(("jax", "numpy")) | {"command": "python -m experiments.report"}
        file = args.output / "report.html"
        file.write_text(page(paper, beyond, miniature(), about))
    except SloraError as error:
        print("experiments.report: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.report: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
