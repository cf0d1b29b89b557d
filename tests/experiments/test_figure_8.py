"""Figure 8: the published values, and the simulation beside them."""

from pathlib import Path

import pytest

from experiments.figure_8 import VARIANTS, Load, bars, draw, memory_share, summary, table
from experiments.paper.figure_8 import FIGURE_8
from slora_jax.simulation import load_device

SHORT = Load(rate=4.0, duration=4.0)


@pytest.fixture(scope="module")
def groups():
    return {point: bars(point, SHORT) for point in FIGURE_8[:2]}


def test_the_published_values_are_what_the_reference_says_of_them() -> None:
    losses = [1 - point.slora / point.without_lora_communication for point in FIGURE_8]
    assert (round(min(losses), 2), round(max(losses), 2)) == (0.18, 0.3)
    ratios = [point.base / point.slora for point in FIGURE_8]
    assert (round(min(ratios), 1), round(max(ratios), 1)) == (1.5, 2.7)


def test_a_pool_takes_as_much_of_a_device_as_the_published_ones() -> None:
    """13B: 26.0 GB of weights, and 14000 or 65000 tokens of 800 KiB."""
    assert memory_share("a100-40") == pytest.approx((26.0e9 + 14_000 * 819_200) / (40 * 2**30), rel=2e-3)
    assert memory_share("a100-80") == pytest.approx((26.0e9 + 65_000 * 819_200) / (80 * 2**30), rel=2e-3)


def test_what_is_sent_and_computed_costs_throughput(groups) -> None:
    for made in groups.values():
        slora, silent, base, replicated, by_input = (bar.simulated for bar in made)
        assert slora < silent < base
        assert replicated < silent
        assert by_input <= slora
    small, large = (made[2].simulated for made in groups.values())
    assert small < large  # two devices, and four


def test_slower_links_cost_throughput_only_where_something_is_sent(groups) -> None:
    point, made = next(iter(groups.items()))
    device = load_device(point.device).fitted("pytorch", collective_seconds=1e-3)
    slower = bars(point, SHORT, device)
    fallen = [slow.simulated / bar.simulated for slow, bar in zip(slower, made, strict=True)]
    assert max(fallen) < 1
    assert fallen[0] < fallen[1]


def test_errors_and_pictures(groups, tmp_path: Path) -> None:
    point, made = next(iter(groups.items()))
    assert made[0].error == pytest.approx(made[0].simulated / point.slora - 1)
    assert [bar.error is None for bar in made] == [variant.published is None for variant in VARIANTS]
    found = summary(groups)
    errors = [abs(bars_[0].error) for bars_ in groups.values()]
    assert found["mean error, S-LoRA"] == pytest.approx(sum(errors) / 2, abs=1e-4)
    assert table(groups).count("\n") == 3
    pytest.importorskip("matplotlib")
    draw(groups, tmp_path / "figure_8.png")
    assert (tmp_path / "figure_8.png").read_bytes().startswith(b"\x89PNG")
