"""Experiments as files: typed, checked, spelled out as runs."""

from experiments.config.load import Experiment, Run, load_experiment, make_experiment
from experiments.config.schema import RunConfig

__all__ = ["Experiment", "Run", "RunConfig", "load_experiment", "make_experiment"]
