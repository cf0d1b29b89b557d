"""The systems that the paper compares, by name: each is the base settings with one field changed."""

from experiments.systems.packed import OutOfMemory, Packed
from experiments.systems.settings import SYSTEMS, SystemSettings, settings_of
from experiments.systems.system import System, make_system
from experiments.systems.workload import Run, Workload, WorkloadRequest

__all__ = [
    "SYSTEMS",
    "OutOfMemory",
    "Packed",
    "Run",
    "System",
    "SystemSettings",
    "Workload",
    "WorkloadRequest",
    "make_system",
    "settings_of",
]
