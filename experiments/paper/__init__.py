"""The paper's experiments as data: settings, systems' arguments, raw results, and which rows make which figure."""

from experiments.paper.results import RESULTS_VARIABLE, PaperRow, find_results, load_rows
from experiments.paper.settings import DEVICES, SETTINGS, Setting

__all__ = ["DEVICES", "RESULTS_VARIABLE", "SETTINGS", "PaperRow", "Setting", "find_results", "load_rows"]
