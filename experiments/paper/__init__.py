"""The paper's experiments as data: settings, systems' arguments, raw results, and which rows make which figure."""

from experiments.paper.results import PaperRow, load_rows
from experiments.paper.settings import DEVICES, SETTINGS, Setting

__all__ = ["DEVICES", "SETTINGS", "PaperRow", "Setting", "load_rows"]
