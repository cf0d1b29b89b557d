"""What carries out a run: the simulator, or the engine on this machine."""

from experiments.runners.real import RealRunner
from experiments.runners.simulated import run_simulated

__all__ = ["RealRunner", "run_simulated"]
