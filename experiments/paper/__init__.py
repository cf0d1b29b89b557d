"""The paper's experiments as data: settings, arguments of the systems, raw results."""

from experiments.paper.results import PaperRow, load_rows
from experiments.paper.settings import DEVICES, SETTINGS, Setting

__all__ = ["DEVICES", "SETTINGS", "PaperRow", "Setting", "load_rows"]
