"""The systems that the paper compares, by name: each changes one field of the base settings."""

from experiments.systems.packed import OutOfMemory, Packed
from experiments.systems.serving import Run
from experiments.systems.settings import SYSTEMS, SystemSettings, settings_of
from experiments.systems.system import System

__all__ = [
    "SYSTEMS",
    "OutOfMemory",
    "Packed",
    "Run",
    "System",
    "SystemSettings",
    "settings_of",
]
