"""Runners: the simulator, the engine on this machine, a running server."""

from experiments.runners.real import RealRunner
from experiments.runners.served import run_served
from experiments.runners.simulated import run_simulated

__all__ = ["RealRunner", "run_served", "run_simulated"]
