"""The order of systems in a figure: which of two is better, published and reproduced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

from experiments.paper.figures import Figure
from experiments.paper.results import PaperRow

TIE = 0.05
"""Published values closer than this, relative to the larger, are a tie: no order is claimed. (Runs that the authors
repeated differ by up to 6%.)"""

SHARE_TIE = 0.05
"""The same for shares (attainment, satisfaction), absolute."""

SHARES = ("attainment", "satisfaction")


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


def check_order(figure: Figure, reproduced: Callable[[PaperRow, str], float | None]) -> list[OrderCheck]:
    """All pairs of the figure's curves that are no tie as published, at every point of the axis that both have.

    reproduced: the value of a row's metric in our run; None leaves the pair out.
    """
    checks = []
    for panel in figure.panels:
        for metric in figure.metrics:
            for first, second in combinations(panel.curves, 2):
                others = {getattr(row, panel.axis): row for row in second.rows}
                for row in first.rows:
                    at = getattr(row, panel.axis)
                    other = others.get(at)
                    if other is None:
                        continue
                    published = getattr(row, metric), getattr(other, metric)
                    ours = reproduced(row, metric), reproduced(other, metric)
                    if is_tie(metric, *published) or ours[0] is None or ours[1] is None:
                        continue
                    checks.append(
                        OrderCheck(
                            panel.title,
                            metric,
                            panel.axis,
                            at,
                            (first.name, second.name),
                            published,
                            (ours[0], ours[1]),
                        )
                    )
    return checks


def is_tie(metric: str, a: float, b: float) -> bool:
    if metric in SHARES:
        return abs(a - b) <= SHARE_TIE
    return abs(a - b) <= TIE * max(abs(a), abs(b))


def violations(checks: Iterable[OrderCheck]) -> list[OrderCheck]:
    return [check for check in checks if not check.right]
