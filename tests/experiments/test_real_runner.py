"""Runs on the engine: the simulator's counts, no state of the run before, no compilation within a run."""

import json
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from tiny_model import REAL_RUN, REPLICAS_TOKENS, SMALL, TINY_LLAMA, TinyModel

from experiments.config import make_experiment
from experiments.config.schema import WorkloadConfig
from experiments.runners import RealRunner, run_simulated
from experiments.runners.workload import run_workload
from experiments.systems import System
from experiments.workloads import engine_requests
from slora_jax import ConfigError, Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.scheduling import EarlyAbort, Lcfs

CONTENT = {
    "mode": "real",
    "model": str(TINY_LLAMA),
    "slo_seconds": 0.5,
    "adapters": {"count": 3, "ranks": [16, 4]},
    "workload": {"rate": 400, "duration": 0.03, "input_range": [3, 24], "output_range": [2, 9]},
    "system": {**REAL_RUN["system"], "prefix_cache": False},
    "engine": REAL_RUN["engine"],
}


def configs(*cases, **changes):
    """A run for each case, a mapping of sections."""
    return [
        run.config for run in make_experiment("small", CONTENT | {"cases": [changes | case for case in cases]}).runs
    ]


@pytest.fixture(scope="module")
def runner():
    with RealRunner() as runner:
        yield runner


@pytest.fixture
def ran(monkeypatch):
    """The outcomes of systems, in order: records and tokens."""
    runs, real = [], System.run_with_tokens

    def spy(system, workload):
        runs.append(real(system, workload))
        return runs[-1]

    monkeypatch.setattr(System, "run_with_tokens", spy)
    return runs


ALIKE = {"slora-paper": {"mixed": True, "page_size": 8, "admit_every": 1}, "packed": {"replicas": 3}}
"""Settings of the simulator that the engine has anyway."""


@pytest.mark.parametrize("name", ["slora", "slora-paper", "merge", "packed", "peft"])
def test_the_same_requests_and_tokens_as_in_the_simulator(runner, ran, name) -> None:
    memory = {"num_tokens": REPLICAS_TOKENS} if name == "packed" else {}
    (config,) = configs({"system": {"name": name, **memory}})
    real = runner.run(config)
    (alike,) = configs({"mode": "simulated", "system": {"name": name, **ALIKE.get(name, {})}})
    simulated = run_simulated(alike)
    for figure in ("requests", "completed", "aborted"):
        assert real[figure] == simulated[figure], figure
    work = run_workload(config)
    records = ran[-1].records
    assert [record.prompt_tokens for record in records] == work.prompt_tokens.tolist()
    assert [len(tokens) for tokens in ran[-1].tokens] == work.output_tokens.tolist()
    assert [record.adapter for record in records] == [f"{adapter}" for adapter in work.adapter]
    if name != "peft":
        assert real["prompt_tokens"] == simulated["prompt_tokens"] == work.prompt_tokens.sum()
        assert real["tokens_computed"] == simulated["tokens_computed"]
    if name.startswith("slora"):
        assert real["adapter_loads"] >= 3 and real["adapter_merges"] == 0
    if name == "merge":
        assert real["adapter_merges"] >= 3


def test_a_run_keeps_no_state_of_the_run_before(runner, ran) -> None:
    first, other, again = configs(
        {"adapters": {"count": 3}},
        {"adapters": {"count": 6, "ranks": [16, 1, 3]}, "system": {"policy": "lcfs"}},
        {"adapters": {"count": 3}},
    )
    before, _, after = runner.run(first), runner.run(other), runner.run(again)
    for counter in ("adapter_loads", "tokens_computed", "prompt_tokens", "preemptions", "aborts", "prefix_hit_tokens"):
        assert before[counter] == after[counter], counter
    assert before["adapter_loads"] == 3 and before["adapter_evictions"] == before["prefix_hit_tokens"] == 0
    assert ran[-1].tokens == ran[-3].tokens != ran[-2].tokens


def test_nothing_is_compiled_within_a_run(runner, compilations) -> None:
    for config in configs({}, {"adapters": {"count": 0}}, {"system": {"policy": "lcfs"}}):
        system = runner._prepare(config, run_workload(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_prepare", lambda *_, system=system: system)
            compilations.clear()
            assert runner.run(config)["completed"] == len(run_workload(config))
            assert not compilations
    jax.jit(lambda x: x * 3 + 1)(np.ones(7))
    assert compilations


def test_policies_and_eviction_reach_the_engine(runner) -> None:
    lcfs, abort, again = configs(
        {"system": {"policy": "lcfs"}},
        {"system": {"policy": {"name": "early_abort", "rule": "code", "slo": 0.011, "margin": 0.01}}},
        {"system": {"policy": {"name": "early_abort", "rule": "code", "slo": 0.011, "margin": 0.01}}},
    )

    def policy_now():
        (system,) = runner._systems.values()
        return system.server.scheduler.policy

    runner.run(lcfs)
    assert isinstance(policy_now(), Lcfs)
    figures = runner.run(abort)
    policy = policy_now()
    assert isinstance(policy, EarlyAbort) and policy.slo == 0.011
    assert figures["aborts"] == figures["aborted"] > 0
    assert figures["aborted"] + figures["completed"] == figures["requests"]
    runner.run(again)
    assert policy_now() is not policy  # a new one has no state

    one_user = {"client": {"kind": "closed", "users": 1}}
    kept, dropped = configs(one_user, one_user | {"system": {"eviction": "immediate"}})
    adapters = run_workload(kept).adapter.tolist()
    assert runner.run(kept)["adapter_loads"] == len(set(adapters))
    assert runner.run(dropped)["adapter_loads"] >= 1 + sum(a != b for a, b in pairwise(adapters)) > len(set(adapters))
    (dear,) = configs({"system": {"eviction": "cost_aware"}})
    assert runner.run(dear)["completed"] == 12


def test_a_closed_loop_holds_its_number_of_users(runner, ran) -> None:
    users = 3
    (config,) = configs({"client": {"kind": "closed", "users": users}})
    runner.run(config)
    records = ran[-1].records
    for before, record in zip(records, records[users:], strict=False):
        assert record.arrival == pytest.approx(before.finished, abs=1e-6)
    first_to_leave = min(record.finished for record in records[-users:])
    moments = np.linspace(records[0].arrival, first_to_leave, 200)[1:-1]
    at_once = [sum(r.arrival <= moment < r.finished for r in records) for moment in moments]
    assert set(at_once) == {users}


def test_packed_replicas_are_made_anew_for_other_adapters(runner, ran) -> None:
    tokens = []
    for targets in (["q"], ["q", "k", "v", "o"]):
        adapters = {"count": 3, "ranks": [16], "targets": targets}
        (config,) = configs({"adapters": adapters, "system": {"name": "packed", "num_tokens": REPLICAS_TOKENS}})
        runner.run(config)
        tokens.append(ran[-1].tokens)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ({"admit_every": 10}, "system.admit_every: is of the simulator only; leave it out, or use mode=simulated"),
        ({"software": "vllm"}, "system.software: is of the simulator only"),
        ({"num_tokens": None}, "system.num_tokens: must be given in real mode"),
        ({"name": "no-unify-mem"}, "system.adapter_tokens: must be given for no-unify-mem in real mode"),
        ({"name": "packed", "policy": "lcfs"}, r"system.policy={'name': 'lcfs'}: packed has none; leave it out"),
        ({"name": "merge", "policy": "fcfs"}, "system.policy={'name': 'fcfs'}: merge serves one adapter at a time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_of_the_simulator_is_refused_by_name(runner, system, message) -> None:
    (config,) = configs({"system": system})
    with pytest.raises(ConfigError, match=message):
        runner.run(config)


def test_a_run_that_does_not_fit_leaves_the_runner_usable(runner) -> None:
    long, packed, fine = configs(
        {"workload": {"input_range": [100, 101]}},
        {"adapters": {"count": 40}, "system": {"name": "packed"}},
        {},
    )
    for config in (long, packed):
        with pytest.raises(Exception, match="max_model_len|out of memory"):
            runner.run(config)
    assert runner.run(fine)["completed"] == 12


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model and three adapters on disk, of ranks 16, 2 and 4."""
    root = tmp_path_factory.mktemp("own")
    tiny = TinyModel()
    (root / "model").mkdir()
    tiny.save(root / "model")
    for name, rank in (("french", 16), ("legal", 2), ("sql", 4)):
        write_peft(root / "adapters" / name, random_adapter(tiny.geometry, rank, ("q", "down"), seed=rank))
    return root


@pytest.mark.parametrize("name", ["slora", "peft"])
def test_a_model_and_adapters_on_disk_answer_as_the_engine_does(runner, ran, own, name) -> None:
    (config,) = configs({"model": str(own / "model"), "adapters": str(own / "adapters"), "system": {"name": name}})
    assert (config.adapters.count, config.adapters.ranks, config.adapters.targets) == (3, (16, 2, 4), ("q", "down"))
    runner.run(config)
    work = run_workload(config)
    requests = engine_requests(work, config.model_config().vocab_size, config.seed)
    settings = EngineConfig(dtype="float32", page_size=8, compile_ahead=False, progress=False, **SMALL)
    with Engine.from_pretrained(own / "model", settings) as engine:
        engine.load_adapters(own / "adapters")
        outputs = engine.generate(
            [request.prompt for request in requests],
            [SamplingParams(max_tokens=request.output, ignore_eos=True) for request in requests],
            [("french", "legal", "sql")[number] for number in work.adapter],
        )
    assert ran[-1].tokens == [output.token_ids for output in outputs]


def test_a_log_is_replayed_for_the_adapters_that_it_names(runner, ran, own) -> None:
    log = own / "log.jsonl"
    rows = [(3.0, "sql", 5, 4), (1.0, None, [7, 8, 9], 2), (1.5, "french", 6, 3)]
    fields = ("time", "adapter", "prompt_tokens", "output_tokens")
    log.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
    (config,) = configs({"model": str(own / "model"), "adapters": str(own / "adapters")})
    config = replace(config, workload=WorkloadConfig("replay", parameters={"path": str(log), "speed": 10.0}))
    assert runner.run(config)["completed"] == 3
    records = ran[-1].records
    assert [(r.adapter, r.prompt_tokens, r.output_tokens) for r in records] == [(None, 3, 2), ("0", 6, 3), ("2", 5, 4)]
    assert [round(r.arrival - records[0].arrival, 6) for r in records] == [0, 0.05, 0.2]
    log.write_text('{"time": 0, "adapter": "latin", "prompt_tokens": 3, "output_tokens": 1}\n')
    with pytest.raises(ConfigError, match=r"the log names adapter 'latin'; .*'french', 'legal', 'sql'"):
        runner.run(config)
