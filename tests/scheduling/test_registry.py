"""Policies by name."""

import pytest

from slora_jax.errors import ConfigError
from slora_jax.scheduling import POLICIES, Ageing, Clustering, EarlyAbort, Fcfs, Lcfs, OneAdapter, Vtc, make_policy


@pytest.mark.parametrize(
    ("name", "settings", "policy"),
    [
        ("early_abort", {"slo": 3.0, "rule": "code"}, EarlyAbort(3.0, "code")),
        ("clustering", {"max_adapters_in_batch": 4, "hard": True}, Clustering(4, hard=True)),
        ("vtc", {"weights": {"a": 2.0}}, Vtc({"a": 2.0})),
        ("one_adapter", {"max_overtaken": 8}, OneAdapter(8)),
        ("ageing", {"inner": {"name": "clustering", "max_adapters_in_batch": 2}, "bound": 5}, Ageing(Clustering(2), 5)),
    ],
)
def test_policy_is_made_by_name_with_its_settings(name, settings, policy) -> None:
    assert make_policy(name, **settings) == policy


def test_every_name_makes_its_class() -> None:
    needed = {"clustering": {"max_adapters_in_batch": 1}, "ageing": {"inner": "lcfs", "bound": 1.0}}
    assert {name: type(make_policy(name, **needed.get(name, {}))) for name in POLICIES} == POLICIES
    assert isinstance(make_policy("ageing", inner="lcfs", bound=1.0).inner, Lcfs)
    assert type(make_policy("fcfs")) is Fcfs


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fcsf", {}, "'fcsf' is unknown .did you mean 'fcfs'.*early_abort"),
        ("zzz", {}, "'zzz' is unknown; there are fcfs"),
        ("early_abort", {"sol": 6}, "no setting 'sol' .did you mean 'slo'.*slo, rule, margin"),
        ("early_abort", {"_busy": 6}, "no setting '_busy'"),
        ("fcfs", {"slo": 6}, "no setting 'slo'; it has none"),
        ("early_abort", {"slo": 0}, "EarlyAbort.slo=0"),
        ("early_abort", {"slo": 0.4}, "EarlyAbort.margin=0.5"),
        ("early_abort", {"rule": "text"}, "EarlyAbort.rule='text'.*paper"),
        ("clustering", {}, "max_adapters_in_batch"),
        ("clustering", {"max_adapters_in_batch": 0}, "max_adapters_in_batch=0"),
        ("one_adapter", {"max_overtaken": -1}, "max_overtaken=-1"),
        ("vtc", {"weights": {"a": 0}}, "weights.'a'.=0"),
        ("vtc", {"output_price": -1}, "output_price=-1"),
        ("ageing", {"bound": 1}, "inner"),
        ("ageing", {"inner": "fcfs", "bound": -1}, "bound=-1"),
        ("ageing", {"inner": {"slo": 1}, "bound": 1}, "no 'name'"),
        ("ageing", {"inner": {"name": "lfcs"}, "bound": 1}, "did you mean 'lcfs'"),
        ("ageing", {"inner": 3, "bound": 1}, "inner=3"),
    ],
)
def test_errors_name_the_mistake_and_the_nearest_name(name, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name, **settings)
