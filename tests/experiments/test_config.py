"""Config files: runs from cases and sweeps, in YAML and in gin; wrong names and values are refused."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest

import experiments
from experiments.config import load_experiment, make_experiment
from experiments.config.schema import MODELS
from experiments.runners.simulated import run_simulated
from slora_jax import ConfigError

YAML = """
title: Two systems
x: workload.rate
metrics: [throughput, latency]
device: a100-80
adapters: {count: [5, 10], ranks: [64, 8]}
workload: {rate: [1, 2.5], duration: 3, cv: 2, input_range: [8, 16]}
cases:
- curve: ours
  system: {name: slora, num_tokens: 5000, policy: {name: early_abort, slo: 2.0}}
- curve: theirs
  adapters: {ranks: [[8], [16, 4]]}
  system: {name: slora-paper, num_tokens: 5000}
"""

GIN = """
experiment.title = "Two systems"
experiment.x = "workload.rate"
experiment.metrics = ["throughput", "latency"]
experiment.device = "a100-80"
adapters.count = [5, 10]
adapters.ranks = [64, 8]
workload.rate = [1, 2.5]
workload.duration = 3
workload.cv = 2
workload.input_range = [8, 16]
experiment.cases = [
    {"curve": "ours", "system": {"name": "slora", "num_tokens": 5000, "policy": {"name": "early_abort", "slo": 2.0}}},
    {"curve": "theirs", "adapters": {"ranks": [[8], [16, 4]]}, "system": {"name": "slora-paper", "num_tokens": 5000}},
]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, suffix=".yaml"):
        file = tmp_path / f"both{suffix}"
        file.write_text(text)
        return file

    return write


def test_every_combination_of_every_case_is_a_run_the_last_list_varying_fastest(write) -> None:
    experiment = load_experiment(write(YAML))
    ours = [run.config for run in experiment.runs if run.curve == "ours"]
    assert [(run.adapters.count, run.workload.rate) for run in ours] == list(product((5, 10), (1.0, 2.5)))
    assert {run.adapters.ranks for run in ours} == {(64, 8)}  # a list of numbers is the field itself
    theirs = [run.config for run in experiment.runs if run.curve == "theirs"]
    swept = [(run.adapters.count, run.adapters.ranks, run.workload.rate) for run in theirs]
    assert swept == list(product((5, 10), ((8,), (16, 4)), (1.0, 2.5)))
    assert all(run.workload.parameters == {"cv": 2.0, "input_range": (8, 16)} for run in ours + theirs)
    assert ours[0].system.policy == {"name": "early_abort", "slo": 2.0}
    assert len({run.key for run in ours + theirs}) == 12


def test_yaml_and_gin_give_the_same_experiment(write) -> None:
    assert load_experiment(write(GIN, ".gin")) == load_experiment(write(YAML))


def test_a_second_gin_file_knows_nothing_of_the_first(write) -> None:
    load_experiment(write(GIN, ".gin"))
    alone = load_experiment(write('workload.rate = 3\nexperiment.title = "alone"\n', ".gin"))
    assert [run.config.workload.rate for run in alone.runs] == [3.0]
    assert alone.runs[0].config.adapters.count == 1


def test_overrides_hold_in_every_case_and_may_sweep(write) -> None:
    experiment = load_experiment(
        write(YAML), ["adapters.ranks=[4]", "seed=[1,2]", "workload.rate=7", "system.page_size=32"]
    )
    configs = [run.config for run in experiment.runs]
    assert len(configs) == 2 * 2 * 2  # cases, counts, seeds
    assert {c.adapters.ranks for c in configs} == {(4,)} and {c.seed for c in configs} == {1, 2}
    assert {c.workload.rate for c in configs} == {7.0}
    assert all(c.system.settings["page_size"] == 32 for c in configs)


def test_labels_may_name_fields_and_policies_may_be_swept() -> None:
    policies = ["fcfs", {"name": "clustering", "max_adapters_in_batch": 4}]
    made = make_experiment("x", {"curve": "{system.policy.name} at {workload.rate}", "system": {"policy": policies}})
    assert [run.curve for run in made.runs] == ["fcfs at 1.0", "clustering at 1.0"]


def test_cases_may_have_cases() -> None:
    inner = [{"device": "a10g"}, {"device": "h200", "seed": [1, 2]}]
    made = make_experiment("x", {"cases": [{"panel": "P", "cases": inner}, {"panel": "Q"}]})
    found = [(run.panel, run.config.device, run.config.seed) for run in made.runs]
    assert found == [("P", "a10g", 42), ("P", "h200", 1), ("P", "h200", 2), ("Q", "a10g", 42)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"worklod": {}}, r"worklod is unknown \(did you mean 'workload'\?\)"),
        ({"workload": {"rte": 1}}, r"workload\.rte is unknown \(did you mean 'rate'\?\)"),
        ({"workload": {"rate": "fast"}}, r"workload\.rate='fast': must be a number"),
        ({"workload": {"rate": [1, "x"]}}, r"workload\.rate='x': must be a number"),
        ({"workload": {"rate": 0}}, r"workload\.rate=0\.0: must be positive"),
        ({"workload": {"rate": []}}, r"workload\.rate=\[\]: a sweep must have one value at least"),
        ({"workload": {"kind": "sinthetic"}}, r"workload\.kind=sinthetic is unknown \(did you mean 'synthetic'\?\)"),
        ({"workload": {"input_range": [1, 2, 3]}}, r"workload\.input_range=\[1, 2, 3\]: must be a list of 2 values"),
        ({"workload": 3}, r"workload=3: must be a section with fields kind, rate"),
        ({"adapters": {"count": True}}, r"adapters\.count=True: must be an integer"),
        ({"adapters": {"count": 1.5}}, r"adapters\.count=1\.5: must be an integer"),
        ({"adapters": {"ranks": []}}, r"adapters\.ranks=\[\]: must be positive integers"),
        ({"adapters": {"targets": ["x"]}}, r"adapters\.targets\[0\]='x': must be 'q' or 'k'"),
        ({"system": {"name": "slorra"}}, r"system\.name=slorra is unknown \(did you mean 'slora'\?\)"),
        ({"system": {"num_token": 5}}, r"system\.num_token is unknown \(did you mean 'num_tokens'\?\)"),
        ({"system": {"policy": "vtcc"}}, r"policy 'vtcc' is unknown \(did you mean 'vtc'\?\)"),
        ({"system": {"policy": {"slo": 3}}}, r"system\.policy=\{'slo': 3\}: must have a name"),
        ({"mode": "reel"}, r"mode='reel': must be 'simulated' or 'real' or .* \(did you mean 'real'\?\)"),
        ({"device": "h2000"}, r"device='h2000' is unknown \(did you mean 'h200'\?\)"),
        ({"model": "llama-8b"}, r"model='llama-8b': no such file \(did you mean 'llama-"),
        ({"client": {"kind": "closed", "users": 0}}, r"client\.users=0: must be at least 1"),
        ({"cases": []}, r"cases=\[\]: must be a list of changes, one at least"),
        ({"metrics": "throughput"}, r"metrics='throughput': must be a list"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_value_is_refused_with_the_remedy(content, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_experiment("x", content)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("a: [1", ".yaml", r"both\.yaml: .*"),
        ("- 1", ".yaml", r"both\.yaml: must be a mapping"),
        ("seed: 1\nseed: 2", ".yaml", r"both\.yaml: .*duplicate key"),
        ("workload.rate = ", ".gin", r"both\.gin"),
        ("work.rate = 1", ".gin", r"both\.gin: No configurable matching 'work'"),
        ("workload.rte = 1", ".gin", r"both\.gin: workload\.rte is unknown"),
        ("", ".txt", r"both\.txt: must end in \.yaml or \.gin"),
    ],
)
def test_an_unreadable_file_is_named(write, text, suffix, message) -> None:
    with pytest.raises(ConfigError, match=f"(?s).*{message}"):
        load_experiment(write(text, suffix))


def test_a_wrong_override_is_named(write) -> None:
    file = write(YAML)
    with pytest.raises(ConfigError, match=r"'fast': must be name=value"):
        load_experiment(file, ["fast"])
    with pytest.raises(ConfigError, match=r"title: can be changed in the file only"):
        load_experiment(file, ["title=x"])
    with pytest.raises(ConfigError, match=r"workload\.rte is unknown"):
        load_experiment(file, ["workload.rte=1"])
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file; there are .*both\.yaml"):
        load_experiment(file.with_name("nothing.yaml"))


def test_the_examples_are_one_experiment() -> None:
    folder = Path(experiments.__file__).parent / "configs"
    made = load_experiment(folder / "example.yaml")
    assert made == replace(load_experiment(folder / "example.gin"), name=made.name)
    assert [run.curve for run in made.runs] == ["fcfs"] * 4 + ["early_abort"] * 4


OWN = """
import numpy as np

from experiments.workloads import Workload
from slora_jax.scheduling import Policy


class Shortest(Policy):
    def order(self, requests, now):
        return sorted(requests, key=lambda request: request.max_new - request.num_sampled)


def burst(*, num_adapters, ranks, rate, duration, seed=42, size: int = 10, lengths: tuple[int, int] = (8, 16)):
    n = int(rate * duration)
    random = np.random.default_rng(seed)
    tokens = random.integers(*lengths, (2, n))
    arrival = np.arange(n) // size * size / rate
    return Workload(arrival, random.integers(0, num_adapters, n), *tokens, tuple(ranks)[:1] * num_adapters)
"""


def test_policies_and_workloads_of_other_modules_work_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_own_study.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    content = {
        "workload": {"kind": "my_own_study:burst", "rate": 5, "duration": 4, "size": [2, 20], "lengths": [4, 9]},
        "adapters": {"count": 3},
        "system": {"name": "slora", "num_tokens": 4000, "max_num_seqs": 2, "policy": ["my_own_study:Shortest", "fcfs"]},
    }
    runs = make_experiment("x", content).runs
    curves = ["slora, my_own_study:Shortest", "slora, fcfs"]
    assert [(r.config.workload.parameters["size"], r.curve) for r in runs] == [(n, c) for n in (2, 20) for c in curves]
    latency = [run_simulated(run.config)["latency"] for run in runs[2:]]
    assert latency[0] < latency[1]  # shortest first, of twenty that come at once
    with pytest.raises(ConfigError, match=r"workload\.sise is unknown \(did you mean 'size'\?\)"):
        make_experiment("x", {"workload": {"kind": "my_own_study:burst", "sise": 2}})
    for kind in ("my_own_study:bust", "nowhere:burst"):
        with pytest.raises(ConfigError, match=f"workload.kind={kind}: "):
            make_experiment("x", {"workload": {"kind": kind}})
    for policy in ("my_own_study:burst", "my_own_study:Shorter", "nowhere:Shortest"):
        with pytest.raises(ConfigError, match=f"policy '{policy}': "):
            make_experiment("x", {"system": {"policy": policy}})


def test_model_adapters_and_device_may_be_paths(tmp_path) -> None:
    (tmp_path / "model.json").write_text((MODELS / "mini-llama.json").read_text())
    device = tmp_path / "mine.json"
    device.write_text((files("slora_jax.simulation") / "devices" / "a10g.json").read_text())
    for name, rank in (("a", 4), ("b", 16)):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        text = json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["v_proj", "q_proj"]})
        (tmp_path / "adapters" / name / "adapter_config.json").write_text(text)
    content = {
        "model": str(tmp_path / "model.json"), "device": str(device), "adapters": {"path": str(tmp_path / "adapters")},
        "workload": {"rate": 4, "duration": 4}, "system": {"num_tokens": 4000},
    }  # fmt: skip
    (run,) = make_experiment("x", content).runs
    adapters = run.config.adapters
    assert (adapters.count, adapters.ranks, adapters.targets) == (2, (4, 16), ("q", "v"))
    named = make_experiment("x", content | {"model": "mini-llama", "device": "a10g"}).runs[0].config
    assert run_simulated(run.config) == run_simulated(named)
    for change, message in (
        ({"count": 3}, r"adapters\.count=3: path=.* has 2; lower it"),
        ({"ranks": [8]}, r"adapters\.ranks: the adapters in path=.* have their own; leave it out"),
        ({"path": str(tmp_path)}, r"adapters\.path=.*: has no PEFT directories"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_experiment("x", content | {"adapters": content["adapters"] | change})
    device.write_text("{")
    with pytest.raises(ConfigError, match="device '.*mine.json'"):
        run_simulated(run.config)
