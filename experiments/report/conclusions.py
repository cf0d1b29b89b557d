"""What the paper concludes, as checks on results: of the published runs, of the simulator's, and of the engine's.

A check looks at the panels of one experiment and at one source of their values, and says whether the conclusion holds,
with the numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.report.collect import Collected, Curve, Panel, Point

Value = Callable[[Point, str], float | None]


@dataclass(frozen=True)
class Check:
    """A test of one panel.

    Attributes:
      rule: says in words when it holds.
      judge: given a panel and a source, returns whether it holds and the numbers; None if the source has no values.
    """

    rule: str
    judge: Callable[[Panel, Value], tuple[bool, str] | None]

    def __call__(self, panel: Panel, value: Value) -> tuple[bool, str] | None:
        return self.judge(panel, value)


SOURCES: Mapping[str, Value] = {"published": Point.theirs, "ours": Point.ours}


@dataclass(frozen=True)
class Verdict:
    """holds: in all panels. numbers: a line for each panel."""

    holds: bool
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Conclusion:
    """experiment: its name; the miniature on the engine has the same. sentence: what is concluded. up_to: it is a
    greatest value, so one panel is enough."""

    name: str
    experiment: str
    sentence: str
    check: Check
    up_to: bool = False

    def verdict(self, collected: Collected, source: str) -> Verdict | None:
        """None where this source has nothing to judge by."""
        found = [
            (panel.title, judged)
            for panel in collected.panels
            if (judged := self.check(panel, SOURCES[source])) is not None
        ]
        if not found:
            return None
        lines = tuple(f"{title}: {text}" if title else text for title, (_, text) in found)
        return Verdict((any if self.up_to else all)(holds for _, (holds, _) in found), lines)


def flat(metric: str, name: str, least: float) -> Check:
    """The curve's last point is at least `least` of its first."""

    def check(panel: Panel, value: Value) -> tuple[bool, str] | None:
        values = _values(panel.curve(name), metric, value)
        if len(values) < 2:
            return None
        first, last = min(values), max(values)
        ratio = values[last] / values[first]
        return ratio >= least, f"{metric} at {last} is {ratio:.2f} of that at {first}"

    return Check(f"{name}'s {metric} at the end of the axis is at least {least:g} times that at its start", check)


def above(metric: str, name: str, *others: str, slack: float = 0.03, at_least: float = 1.0) -> Check:
    """At every place that both curves have, the first is above each of the others, or below by `slack` at most; and
    somewhere above by a factor of `at_least`."""

    def check(panel: Panel, value: Value) -> tuple[bool, str] | None:
        holds, texts = True, []
        own = _values(panel.curve(name), metric, value)
        for other in others:
            theirs = _values(panel.curve(other), metric, value)
            shared = [at for at in own if theirs.get(at)]
            if not shared:
                continue
            ratios = {at: own[at] / theirs[at] for at in shared}
            low, high = min(ratios, key=lambda at: ratios[at]), max(ratios, key=lambda at: ratios[at])
            holds &= ratios[low] >= 1 - slack and ratios[high] >= at_least
            texts.append(f"{metric} {_range(ratios, low, high)} times {other}'s")
        return (holds, "; ".join(texts)) if texts else None

    rules = [f"everywhere at least {1 - slack:g} times"] if slack < 1 else []
    rules += [f"somewhere at least {at_least:g} times"] if at_least > 1 else []
    return Check(f"{name}'s {metric} is {' and '.join(rules)} that of {' and '.join(others)}", check)


def with_several_adapters(check: Check) -> Check:
    """Only for panels in which more than one adapter is served."""

    def checked(panel: Panel, value: Value) -> tuple[bool, str] | None:
        counts = {point.run.config.adapters.count for curve in panel.curves for point in curve.points}
        return check(panel, value) if max(counts) > 1 else None

    return Check(f"{check.rule}, in each panel with more than one adapter", checked)


def neutral(metric: str, spread: float) -> Check:
    """At every place, the largest of all curves is at most `1 + spread` times the smallest."""

    def check(panel: Panel, value: Value) -> tuple[bool, str] | None:
        curves = [_values(curve, metric, value) for curve in panel.curves]
        ratios = {}
        for at in {at for curve in curves for at in curve}:
            found = [curve[at] for curve in curves if at in curve]
            if len(found) > 1:
                ratios[at] = max(found) / min(found)
        if not ratios:
            return None
        worst = max(ratios, key=lambda at: ratios[at])
        return ratios[worst] <= 1 + spread, f"{metric} differs by a factor of {ratios[worst]:.2f} at most (at {worst})"

    return Check(f"{metric} is everywhere within a factor of {1 + spread:g} between the curves", check)


def _range(ratios: Mapping[Any, float], low: Any, high: Any) -> str:
    ends = [f"{ratios[at]:.2f} (at {at})" for at in dict.fromkeys((low, high))]
    return " to ".join(ends)


def _values(curve: Curve | None, metric: str, value: Value) -> dict[Any, float]:
    points = () if curve is None else curve.points
    return {point.at: found for point in points if (found := value(point, metric)) is not None}


CONCLUSIONS = (
    Conclusion(
        "flat in the number of adapters",
        "figure_5",
        "S-LoRA's throughput is hardly affected by the number of adapters.",
        flat("throughput", "slora", 0.8),
    ),
    Conclusion(
        "unified memory above a split one",
        "figure_5",
        "The unified pool serves more than memory of which a part is set aside for adapters.",
        above("throughput", "slora", "no-unify-mem"),
    ),
    Conclusion(
        "unified memory above a split one, over the rate",
        "figure_6",
        "The same as the request rate grows.",
        above("throughput", "slora", "no-unify-mem"),
    ),
    Conclusion(
        "padded batched products below",
        "figure_5",
        "Products padded to the largest rank and the longest segment cost most of the throughput.",
        above("throughput", "slora", "bmm", at_least=1.5),
    ),
    Conclusion(
        "merging below with several adapters",
        "figure_9",
        "With more than one adapter, merging and unmerging loses to computing adapters on the fly.",
        with_several_adapters(above("throughput", "slora", "merge")),
    ),
    Conclusion(
        "early abort above under overload",
        "figure_10",
        "Early abort keeps more requests within the objective than FCFS and LCFS.",
        above("attainment", "abort", "slora", "lcfs", slack=0.05, at_least=1.1),
    ),
    Conclusion(
        "clustering is neutral",
        "clustering",
        "Keeping a batch to few adapters changes little.",
        neutral("throughput", 0.08),
    ),
    Conclusion(
        "PEFT far below",
        "tables_4_5",
        "PEFT, which serves one adapter's batch at a time, reaches a fraction of S-LoRA's throughput.",
        above("throughput", "slora", "peft", at_least=4.0),
    ),
    Conclusion(
        "30 times PEFT",
        "table_3",
        "Up to 30 times PEFT's throughput with hundreds of adapters.",
        above("throughput", "slora", "peft", at_least=30.0),
        up_to=True,
    ),
    Conclusion(
        "4 times vLLM-packed",
        "table_3",
        "Up to 4 times vLLM-packed's throughput with few adapters.",
        above("throughput", "slora", "vllm-packed", slack=1.0, at_least=3.9),
        up_to=True,
    ),
)
"""In the order of the report."""


def contradictions(collected: Mapping[str, Collected]) -> Iterator[str]:
    """Sentences of the paper that its own raw results, or ours, do not bear out; with the numbers."""
    if (merging := collected.get("figure_9")) is not None:
        yield from _skew(merging)
    if (table := collected.get("table_3")) is not None:
        yield from _packed(table)
    if (parallel := collected.get("figure_8")) is not None:
        yield from _communication(parallel)


def _skew(merging: Collected) -> Iterator[str]:
    for panel in merging.panels:
        texts = []
        for label, value in SOURCES.items():
            values = _values(panel.curve("merge"), "throughput", value)
            if len(values) > 1 and values[min(values)] > 1.02 * values[max(values)]:
                texts.append(f"{values[min(values)]:.2f} at alpha={min(values)}, {values[max(values)]:.2f} at "
                             f"{max(values)} ({label})")  # fmt: skip
        if texts:
            yield (
                f"Merging under skew, {panel.title}: the paper's text has merging suffer from skew. Its throughput is "
                f"higher the more skewed the load is: {'; '.join(texts)}."
            )


def _packed(table: Collected) -> Iterator[str]:
    for panel in table.panels:
        curve = panel.curve("vllm-packed")
        own = _values(panel.curve("slora"), "throughput", Point.theirs)
        for point in () if curve is None else curve.points:
            theirs, ours = point.theirs("throughput"), point.ours("throughput")
            best = max(own.values(), default=None)
            if theirs is not None and best is not None and theirs > best:
                simulated = "" if ours is None else f", {ours:.2f} simulated"
                yield (
                    f"vLLM-packed with {point.at} adapters, {panel.title}: {theirs:.2f} requests/s "
                    f"published{simulated}, above S-LoRA's best of {best:.2f}. The factor of 4 rests on the row of 5 "
                    "adapters alone."
                )


def _communication(parallel: Collected) -> Iterator[str]:
    losses: dict[str, list[float]] = {label: [] for label in SOURCES}
    for panel in parallel.panels:
        for label, value in SOURCES.items():
            own = _values(panel.curve("slora"), "throughput", value)
            silent = _values(panel.curve("no LoRA communication"), "throughput", value)
            losses[label] += [1 - own[at] / silent[at] for at in own if at in silent]
    if losses["published"] and losses["ours"]:
        low, high = min(losses["published"]), max(losses["published"])
        yield (
            f"Tensor parallelism: the text calls the cost of communicating for adapters small. Published, it takes "
            f"{low:.0%} to {high:.0%} of the throughput; simulated, {min(losses['ours']):.0%} to "
            f"{max(losses['ours']):.0%}."
        )
