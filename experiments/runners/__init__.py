"""What carries out a run: the simulator, the engine on this machine, or a running server."""

from experiments.runners.real import RealRunner
from experiments.runners.served import run_served
from experiments.runners.simulated import run_simulated

__all__ = ["RealRunner", "run_served", "run_simulated"]
