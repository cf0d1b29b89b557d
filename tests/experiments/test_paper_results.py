"""The paper's raw results: their types, the arguments of each run, the figures, order and knees."""

from collections import Counter
from dataclasses import replace

import pytest

from experiments.paper import DEVICES, SETTINGS, load_rows
from experiments.paper.arguments import row_arguments
from experiments.paper.exclusions import exclusion
from experiments.paper.knees import Knee, find_knee, knee_error, knees_agree, rate_sweeps
from experiments.report.collect import published_figures
from experiments.report.order import check_order, violations

HEADER = (
    "file,n,alpha,R,cv,D,in_range,out_range,aborts,total_time,throughput,strip_throughput,avg_latency,"
    "avg_first_token_latency,satisfaction,attainment"
)
VALUES = '"[8, 512]","[8, 512]",,300.0,2.0,1.9,10.0,0.5,0.9,0.95'


def rows_of(tmp_path, *starts):
    file = tmp_path / "rows.csv"
    file.write_text("\n".join([HEADER, *(f"{start},{VALUES}" for start in starts)]) + "\n")
    return load_rows(file)


@pytest.mark.parametrize(
    ("name", "system", "device", "setting", "cluster"),
    [
        ("synthetic/slora/synthetic_num_adapters_a10g_S1_slora.jsonl", "slora", "a10g", "S1", None),
        ("synthetic/slora/synthetic_num_adapters_a100_80_S4_slora_large.jsonl", "slora", "a100-80", "S4", None),
        ("synthetic/no_mem/synthetic_num_adapters_a100-40_S4_no_mem.jsonl", "no-unify-mem", "a100-40", "S4", None),
        ("synthetic/lifo/synthetic_cv_a10g_S2_lifo.jsonl", "lcfs", "a10g", "S2", None),
        ("ablation_cluster/ablation_cluster_cv_size_8_a100_S2.jsonl", "clustering", "a100-40", "S2", 8),
        ("ablation_mem/ablation_bmm_a10g_S2_no_mem.jsonl", "bmm", "a10g", "S2", None),
        ("ablation_mem/ablation_mem_a10g_S1_dm.jsonl", "slora", "a10g", "S1", None),
        ("ablation_mem/ablation_mem_a10g_S1_no_mem.jsonl", "no-unify-mem", "a10g", "S1", None),
        ("ablation_merge/ablation_merge_a10g_merge.jsonl", "merge", "a10g", "S2", None),
        ("ablation_merge/ablation_merge_a10g_slora.jsonl", "slora", "a10g", "S2", None),
        ("peft/num_adapter_a100-80_S4_peft_fig3.jsonl", "peft", "a100-80", "S4", None),
    ],
)
def test_a_file_name_gives_system_device_and_setting(tmp_path, name, system, device, setting, cluster) -> None:
    (row,) = rows_of(tmp_path, f"{name},5,0.3,2.5,4,300")
    assert (row.system, row.device, row.setting, row.cluster) == (system, device, setting, cluster)
    assert (row.num_adapters, row.alpha, row.rate, row.cv, row.requests) == (5, 0.3, 2.5, 4.0, 750)
    assert (row.input_range, row.aborts, row.attainment) == ((8, 512), 0, 0.95)


def test_an_unknown_file_name_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"other/x.jsonl: its name has no known device and setting"):
        rows_of(tmp_path, "other/x.jsonl,5,1,2,1,300")


def test_every_published_row_has_a_known_device_setting_and_arguments(paper_rows) -> None:
    assert len(paper_rows) == 1215
    used = [row for row in paper_rows if exclusion(row) is None]
    left_out = Counter(row.system for row in paper_rows if exclusion(row) is not None)
    assert left_out == {"pets": 518, "slora": 39, "abort": 28, "bmm": 17}
    assert {row.device for row in used} == set(DEVICES)
    for row in used:
        arguments = row_arguments(row)
        assert row.setting in SETTINGS and SETTINGS[row.setting].model_file.is_file()
        assert (arguments.num_token is None) == (row.system in ("peft", "vllm-packed"))


def test_baselines_have_the_tokens_that_the_authors_lowered_by_hand(paper_rows) -> None:
    tokens = {row.label: row_arguments(row).num_token for row in paper_rows if exclusion(row) is None}
    assert tokens["slora a10g S2 n=200 R=2"] == 14_500
    assert tokens["no-unify-mem a10g S2 n=1 R=2"] == 13_500
    assert tokens["no-unify-mem a10g S2 n=20 R=2"] == 10_000
    assert tokens["no-unify-mem a10g S2 n=200 R=1.5"] == 9_000
    assert tokens["no-unify-mem a100-80 S2 n=100 R=10"] == 100_000
    assert tokens["bmm a100-80 S4 n=400 R=6 D=30"] == 35_000
    packed = next(row for row in paper_rows if row.system == "vllm-packed" and row.num_adapters == 5)
    assert row_arguments(packed).memory_share == pytest.approx(0.92 / 5)


@pytest.fixture(scope="module")
def figures():
    return {figure.experiment.name: figure for figure in published_figures()}


def test_figures_have_the_published_values(figures) -> None:
    assert len(figures) == 10
    found = {
        (name, panel.title, curve.name): [
            (point.at, round(point.theirs("throughput"), 2)) for point in curve.points if point.published
        ]
        for name, figure in figures.items()
        for panel in figure.panels
        for curve in panel.curves
    }
    a10g = [(1, 1.74), (20, 1.68), (50, 1.61), (100, 1.59), (200, 1.58)]
    assert found["figure_5", "A10G S2", "slora"] == a10g
    assert [value for _, value in found["table_3", "A100-80 S4", "slora"]] == [4.49, 4.43, 4.28, 3.96]
    assert found["table_3", "A100-80 S4", "vllm-packed"] == [(2, 3.83)]
    assert [value for _, value in found["table_3", "A100-80 S1", "peft"]] == [0.88, 0.25]
    assert sorted(value for _, value in found["figure_9", "A10G, 2 adapters", "merge"]) == [1.15, 1.23, 1.33, 1.35]


def test_a_knee_is_found_on_the_logarithm_of_latency() -> None:
    assert find_knee([1, 2, 3], [0.3, 0.3, 30.0]) == Knee(pytest.approx(2.5))  # 3 is halfway from 0.3 to 30
    assert find_knee([1, 2], [5.0, 9.0]).side == "below"
    assert find_knee([1, 2], [0.1, 2.9]).side == "above"


def test_knees_agree_within_the_tolerance_or_on_the_same_side() -> None:
    assert knee_error(Knee(2.0), Knee(2.2)) == pytest.approx(0.1)
    assert knees_agree(Knee(2.0), Knee(2.2), 0.15) and not knees_agree(Knee(2.0), Knee(2.4), 0.15)
    assert knees_agree(Knee(None, "below"), Knee(None, "below"), 0.15)
    assert not knees_agree(Knee(None, "below"), Knee(1.0), 0.15)


def test_the_published_knees_are_found(paper_rows) -> None:
    knees = {
        sweep[0].file.rsplit("/", 1)[-1]: find_knee([r.rate for r in sweep], [r.first_token_latency for r in sweep])
        for sweep in rate_sweeps(paper_rows)
    }
    assert knees["synthetic_req_rate_a10g_S2_slora.jsonl"].rate == pytest.approx(1.66, abs=0.02)
    assert 4 < knees["synthetic_req_rate_a100-80_S4_slora.jsonl"].rate < 6
    assert knees["synthetic_req_rate_a10g_S2_bmm.jsonl"].side == "below"


def test_the_published_order_agrees_with_itself_and_a_swap_is_found(figures) -> None:
    figure_5 = figures["figure_5"]
    checks = check_order(figure_5, getattr)
    assert len(checks) == 127 and not violations(checks)
    assert sum(len(check_order(figure, getattr)) for figure in figures.values()) == 456  # no row is left out

    def swapped(row, metric):
        value = getattr(row, metric)
        return -value if row.system == "bmm" else value

    assert violations(check_order(figure_5, swapped))
    assert not check_order(figure_5, lambda row, metric: None)


def test_near_values_claim_no_order(figures) -> None:
    figure_6 = figures["figure_6"]
    light = [c for c in check_order(replace(figure_6, panels=figure_6.panels[:1]), getattr) if c.at == 1]
    assert {c.metric for c in light if c.systems == ("slora", "no-unify-mem")} == {"first_token_latency"}
