"""The paper's figures and tables that compare systems: which rows make which curve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.paper.exclusions import exclusion
from experiments.paper.results import PaperRow

METRICS = {
    "throughput": "throughput (requests/s)",
    "latency": "mean latency (s)",
    "first_token_latency": "mean first-token latency (s)",
    "attainment": "SLO attainment",
    "satisfaction": "user satisfaction",
}
"""Fields of a row that figures show, with the axis label."""


@dataclass(frozen=True)
class Curve:
    """One system in one panel; its rows are in order of the panel's axis."""

    name: str
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class Panel:
    """Systems side by side over one axis, on one device and setting."""

    title: str
    axis: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Figure:
    """name: file name of its picture. title: what the paper calls it. metrics: what it shows, of `METRICS`."""

    name: str
    title: str
    metrics: tuple[str, ...]
    panels: tuple[Panel, ...]


_TAGS = {"slora": "slora", "no-unify-mem": "no_mem", "bmm": "bmm"}


def figures(rows: Iterable[PaperRow]) -> list[Figure]:
    """All figures of which rows are there; excluded rows are in none."""
    pick = _Picker([row for row in rows if exclusion(row) is None])
    made = [
        _figure_5(pick),
        _figure_6(pick),
        _figure_7(pick),
        _figure_9(pick),
        _figure_10(pick),
        _table_3(pick),
        _tables_4_and_5(pick),
        _clustering(pick),
        _memory(pick),
    ]
    return [figure for figure in made if figure.panels]


class _Picker:
    """Selects rows of files and sorts them along an axis."""

    def __init__(self, rows: list[PaperRow]) -> None:
        self.rows = rows

    def curve(self, name: str, axis: str, files: str | tuple[str, ...], keep: Callable[[PaperRow], bool]) -> Curve:
        names = (files,) if isinstance(files, str) else files
        found = [row for row in self.rows if row.file in names and keep(row)]
        return Curve(name, tuple(sorted(found, key=lambda row: getattr(row, axis))))

    def panel(self, title: str, axis: str, curves: Iterable[Curve]) -> tuple[Panel, ...]:
        """The panel, or none where a curve has no rows."""
        kept = tuple(curve for curve in curves if curve.rows)
        return (Panel(title, axis, kept),) if len(kept) > 1 else ()


def _any(row: PaperRow) -> bool:
    return True


def _adapted(row: PaperRow) -> bool:
    return row.num_adapters != 0


def _synthetic(tag: str, axis: str, place: str, suffix: str = "") -> str:
    return f"synthetic/{tag}/synthetic_{axis}_{place}_{tag}{suffix}.jsonl"


def _figure_5(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for place in ("a10g_S1", "a10g_S2", "a100-40_S4", "a100-80_S2", "a100-80_S4"):
        curves = [
            pick.curve(system, "num_adapters", _synthetic(tag, "num_adapters", place), _adapted)
            for system, tag in _TAGS.items()
        ]
        panels += pick.panel(place.replace("_", " "), "num_adapters", curves)
    return Figure("figure_5", "Figure 5: number of adapters", ("throughput", "latency"), tuple(panels))


def _figure_6(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for place, bmm in (("a10g_S2", ""), ("a100-80_S4", "_30")):
        curves = [
            pick.curve(
                system,
                "rate",
                _synthetic(tag, "req_rate", place, bmm if tag == "bmm" else ""),
                (lambda row: row.duration == 30) if tag == "bmm" and bmm else _any,
            )
            for system, tag in _TAGS.items()
        ]
        panels += pick.panel(place.replace("_", " "), "rate", curves)
    metrics = ("throughput", "first_token_latency", "attainment")
    return Figure("figure_6", "Figure 6: request rate", metrics, tuple(panels))


def _figure_7(pick: _Picker) -> Figure:
    curves = [
        pick.curve(system, "rate", f"real/{tag}/real_req_rate_a10g_S2_{tag}.jsonl", _any)
        for system, tag in _TAGS.items()
    ]
    panels = pick.panel("a10g S2, real workload (ours: a stand-in)", "rate", curves)
    return Figure("figure_7", "Figure 7: the real workload", ("throughput", "attainment"), panels)


def _figure_9(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for adapters in (1, 2, 5):
        curves = [
            pick.curve(
                system,
                "alpha",
                f"ablation_merge/ablation_merge_a10g_{system}.jsonl",
                lambda row: (
                    row.num_adapters == adapters  # noqa: B023 (called at once)
                    and row.cv == 1
                    and row.input_range[1] == row.output_range[1] == 512
                ),
            )
            for system in ("slora", "merge")
        ]
        panels += pick.panel(f"a10g, {adapters} adapter{'s' * (adapters > 1)}", "alpha", curves)
    return Figure("figure_9", "Figure 9: merging", ("throughput", "attainment"), tuple(panels))


def _figure_10(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for place in ("a10g_S2", "a100-80_S4"):
        curves = [
            pick.curve(system, "cv", _synthetic(tag, "cv", place), _any)
            for system, tag in (("slora", "slora"), ("lcfs", "lifo"), ("abort", "abort"))
        ]
        panels += pick.panel(place.replace("_", " "), "cv", curves)
    return Figure("figure_10", "Figure 10: early abort", ("attainment", "satisfaction"), tuple(panels))


def _table_3(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    packed = {"S1": "S2", "S2": "S2", "S4": "S3"}  # vLLM loads the base model, so one run stood for S1 and S2
    for setting in ("S1", "S2", "S4"):
        slora = [_synthetic("slora", "num_adapters", f"a100-80_{setting}", "_table")]
        if setting == "S4":
            slora.append("synthetic/slora/synthetic_num_adapters_a100_80_S4_slora_large.jsonl")
        vllm = f"synthetic/vllm/synthetic_num_adapters_a100-80_{packed[setting]}_vllm.jsonl"
        peft = f"peft/num_adapter_a100-80_{setting}_peft_fig3.jsonl"
        curves = (
            pick.curve("slora", "num_adapters", tuple(slora), lambda row: row.rate == 6 or row.num_adapters != 1000),
            pick.curve("vllm-packed", "num_adapters", vllm, lambda row: row.num_adapters in (2, 5)),
            pick.curve("peft", "num_adapters", peft, _any),
        )
        panels += pick.panel(f"a100-80 {setting}", "num_adapters", curves)
    return Figure("table_3", "Table 3: vLLM-packed and PEFT", ("throughput",), tuple(panels))


def _tables_4_and_5(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for setting in ("S1", "S2"):
        for axis, slora, peft in (("num_adapters", "num_adapters", "adapter"), ("rate", "req_rate", "req")):
            curves = (
                pick.curve("slora", axis, _synthetic("slora", slora, f"a10g_{setting}"), _any),
                pick.curve("peft", axis, f"peft/debug_peft_num_{peft}_a10g_{setting}_peft.jsonl", _any),
            )
            panels += pick.panel(f"a10g {setting}", axis, curves)
    return Figure("tables_4_5", "Tables 4 and 5: PEFT", ("throughput", "latency"), tuple(panels))


def _clustering(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for axis, setting in (("alpha", "S2"), ("alpha", "S4"), ("cv", "S2")):
        infix = "_cv" if axis == "cv" else ""
        curves = [
            pick.curve(f"d={d}", axis, f"ablation_cluster/ablation_cluster{infix}_size_{d}_a100_{setting}.jsonl", _any)
            for d in (1, 2, 4, 8, 32)
        ]
        panels += pick.panel(f"a100-40 {setting}, 32 adapters", axis, curves)
    return Figure("clustering", "Appendix A: adapter clustering", ("throughput", "attainment"), tuple(panels))


def _memory(pick: _Picker) -> Figure:
    panels: list[Panel] = []
    for setting in ("S1", "S2"):
        curves = [
            pick.curve(system, "num_adapters", f"ablation_mem/ablation_{tag}_a10g_{setting}_{end}.jsonl", _any)
            for system, tag, end in (
                ("slora", "mem", "dm"),
                ("no-unify-mem", "mem", "no_mem"),
                ("bmm", "bmm", "no_mem"),
            )
        ]
        panels += pick.panel(f"a10g {setting}, R=2.5", "num_adapters", curves)
    return Figure("memory", "Appendix A: unified memory", ("throughput", "latency"), tuple(panels))
