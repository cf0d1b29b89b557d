"""The order of systems in a figure: the better of two, published and reproduced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from experiments.paper.results import PaperRow
from experiments.report.collect import SHARES, Collected, Curve

TIE = 0.05
"""Published values closer than this, relative to the larger, are a tie, of which no order is claimed. (Runs that the
authors repeated differ by up to 6%.)"""

SHARE_TIE = 0.05
"""The same for shares (attainment, satisfaction), as a difference."""


@dataclass(frozen=True)
class OrderCheck:
    """One pair of systems at one point of one panel."""

    panel: str
    metric: str
    axis: str
    at: float
    systems: tuple[str, str]
    published: tuple[float, float]
    reproduced: tuple[float, float]

    @property
    def right(self) -> bool:
        (a, b), (x, y) = self.published, self.reproduced
        return (a < b) == (x < y) and x != y


def check_order(figure: Collected, reproduced: Callable[[PaperRow, str], float | None]) -> list[OrderCheck]:
    """Returns the pairs of the figure's curves whose published values are not a tie, at every place that both have.

    Args:
      reproduced: the value of a row's metric in our run; None leaves the pair out.
    """
    checks = []
    for panel, metric in product(figure.panels, figure.experiment.metrics):
        for first, second in combinations(panel.curves, 2):
            rows, others = _rows(first), _rows(second)
            for at in [at for at in rows if at in others]:
                published = getattr(rows[at], metric), getattr(others[at], metric)
                ours = reproduced(rows[at], metric), reproduced(others[at], metric)
                if not is_tie(metric, *published) and ours[0] is not None and ours[1] is not None:
                    names = (first.name, second.name)
                    checks.append(OrderCheck(panel.title, metric, panel.x, at, names, published, (ours[0], ours[1])))
    return checks


def _rows(curve: Curve) -> dict[Any, PaperRow]:
    return {point.at: point.published for point in curve.points if isinstance(point.published, PaperRow)}


def is_tie(metric: str, a: float, b: float) -> bool:
    if metric in SHARES:
        return abs(a - b) <= SHARE_TIE
    return abs(a - b) <= TIE * max(abs(a), abs(b))


def violations(checks: Iterable[OrderCheck]) -> list[OrderCheck]:
    return [check for check in checks if not check.right]
