"""Policies on the real engine: aborts are reported per request, and other requests keep their tokens."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.scheduling import Fcfs, Policy, Vtc, make_policy

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [[40 + i, 50, 60 + i] * (1 + i % 3) for i in range(12)]
ADAPTERS = ["a", None, "b"] * 4


class EveryThird(Policy):
    """Aborts every third prompt."""

    def aborts(self, waiting, batch, now):
        dropped = PROMPTS[1::3]
        return [(r, f"prompt {r.prompt} is one of the third") for r in waiting if r.prompt in dropped]


@pytest.fixture
def serve(engine: Engine, tiny) -> Iterator[Callable[..., Engine]]:
    """Returns a function that sets policy and admission of the shared engine for one test."""
    before = engine.scheduler.policy, engine.scheduler.config
    for seed, name in enumerate("ab"):
        engine.load_adapter(name, random_adapter(tiny.geometry, 4, seed=seed))

    def under(policy: Policy, admission: str = "optimistic") -> Engine:
        engine.scheduler.policy = policy
        engine.scheduler.config = replace(engine.scheduler.config, admission=admission)
        return engine

    yield under
    engine.scheduler.policy, engine.scheduler.config = before


@pytest.fixture
def expected(serve) -> list[list[int]]:
    return [output.token_ids for output in serve(Fcfs()).generate(PROMPTS, PARAMS, ADAPTERS)]


def test_aborts_are_per_request_and_the_others_tokens_are_unchanged(serve, expected) -> None:
    engine = serve(EveryThird())
    aborts = engine.stats().aborts
    outputs = engine.generate(PROMPTS, PARAMS, ADAPTERS)
    for number, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        if number % 3 == 1:
            assert (output.finish_reason, output.token_ids) == ("abort", [])
            assert output.error == f"prompt {PROMPTS[number]} is one of the third"
            assert output.metrics.first_token is None and output.metrics.latency >= 0
        else:
            assert (output.finish_reason, output.token_ids, output.error) == ("length", tokens, None)
    assert engine.stats().aborts == aborts + 4


def test_early_abort_aborts_requests_past_the_objective(serve, expected) -> None:
    """By the first step the earlier prompts have waited longer than the objective."""
    outputs = serve(make_policy("early_abort", slo=1e-4, margin=0.0)).generate(PROMPTS, PARAMS, ADAPTERS)
    aborted = [output for output in outputs if output.finish_reason == "abort"]
    assert aborted and all("slo=0.0001 s" in output.error for output in aborted)
    assert all(o.token_ids == tokens for o, tokens in zip(outputs, expected, strict=True) if o not in aborted)


@pytest.mark.parametrize(
    ("name", "settings", "admission"),
    [
        ("lcfs", {}, "optimistic"),
        ("lcfs", {}, "reserve"),
        ("vtc", {}, "optimistic"),
        ("clustering", {"max_adapters_in_batch": 1, "hard": True}, "reserve"),
        ("ageing", {"inner": "lcfs", "bound": 0.01}, "optimistic"),
        ("early_abort", {"slo": 600.0, "rule": "code"}, "reserve"),
    ],
)
def test_policies_do_not_change_tokens(serve, expected, squeeze, name, settings, admission) -> None:
    engine = serve(make_policy(name, **settings), admission)
    with squeeze(engine, 24):
        outputs = engine.generate(PROMPTS, PARAMS, ADAPTERS)
    assert [output.token_ids for output in outputs] == expected


def test_tenants_are_charged(serve) -> None:
    policy = Vtc()
    serve(policy).generate([[5] * 7, [6] * 7], PARAMS, ["a", "b"], tenants=["acme", ""])
    charged = 1 * 7 + 2 * 12
    assert policy.counters == {"acme": charged, "b": charged}
