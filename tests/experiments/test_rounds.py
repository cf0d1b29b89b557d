"""Runs measured side by side: turns, medians, ratios, and a panel of real systems."""

import json

import numpy as np
import pytest
from tiny_model import REAL_RUN, TINY_LLAMA

from experiments import run as runner
from experiments.config import load_experiment, make_experiment
from experiments.config.schema import RunConfig
from experiments.pool_picture import KINDS, draw
from experiments.results_file import read_results
from experiments.rounds import Outcome, different_requests, medians, ratios, side_by_side, turns
from experiments.runners import run_simulated
from experiments.runners.workload import run_workload
from experiments.workloads import engine_requests
from slora_jax import ConfigError, SloraError
from slora_jax.demo.smollm2 import smollm2_path

CONFIGS = runner.RESULTS.parents[1] / "configs"
MICRO = {
    "mode": "real",
    "model": str(TINY_LLAMA),
    "seed": 0,
    "x": "adapters.count",
    "metrics": ["throughput"],
    "adapters": {"count": 3, "ranks": [16, 4]},
    "workload": {"kind": "batch", "requests": 6, "input_range": [2, 20], "output_range": [1, 8]},
    "system": {**REAL_RUN["system"], "prefix_cache": False},
    "engine": REAL_RUN["engine"],
    "measured": {"rounds": 2},
}


def rounds_of(config: str) -> list[RunConfig]:
    return [run.config for run in load_experiment(CONFIGS / "measured" / config).runs]


def test_every_run_has_its_turn_in_each_round_and_another_one_begins():
    found = list(turns("abc", 3, "test"))
    assert [name for _, name in found] == list("abcbcacababc")
    assert [number for number, _ in found] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert list(turns("a", 1, "test", warm_up=False)) == [(1, "a")]


def test_medians_and_ratios_are_of_pairs_within_a_round():
    own = [{"t": 10.0, "n": None}, {"t": 30.0, "n": 4}, {"t": 20.0, "n": 2}]
    other = [{"t": 10.0, "n": 1}, {"t": 10.0, "n": 0}, {"t": 40.0, "n": 1}]
    assert medians(own) == {"t": 20.0, "n": 3}
    assert ratios(own, other) == {"t": 1.0}  # n: missing in one round, and 0 in another
    assert different_requests([[1, 2], [3, 4], [5]], [[1, 2], [3, 9], [5]]) == [1]


def test_a_panel_compares_each_run_with_the_first_at_its_place():
    experiment = make_experiment("x", MICRO | {"cases": [
        {"curve": "ours", "adapters": {"count": [0, 3]}}, {"curve": "theirs"}, {"curve": "fails", "seed": 9},
    ]})  # fmt: skip

    def measure(config, number):
        if config.seed == 9:
            raise SloraError("too large")
        return Outcome({"throughput": 10.0 * number * (config.adapters.count or 5)}, [[number], [7]])

    base, ours, theirs, fails = side_by_side(experiment.runs, measure)
    assert [one["throughput"] for one in ours["rounds"]] == [30.0, 60.0] and ours["metrics"] == {"throughput": 45.0}
    assert "over" not in base and fails == {"metrics": {"error": "too large"}}
    assert ours["over"] == {"curve": "ours", "x": 0, "ratios": {"throughput": 0.6}}
    assert (theirs["over"]["curve"], theirs["over"]["x"]) == ("ours", 3) and theirs["same_tokens"] == [4, 4]


def test_the_offered_rate_is_a_share_of_the_slowest_warm_up():
    content = MICRO | {"measured": {"rounds": 1, "load": 0.5}, "seed": [1, 2]}
    offered = []

    def measure(config, number):
        work = run_workload(config, number)
        offered.append(config.workload.rate if number else work.arrival.max())
        return Outcome({"throughput": 20.0 * config.seed})

    side_by_side(make_experiment("x", content).runs, measure)
    assert offered == [0, 0, 10, 10]


def test_real_systems_give_the_same_tokens_and_one_that_does_not_fit_an_error(tmp_path):
    names = ["slora", "peft", "base", "packed"]  # `test_systems` has the tokens of all
    experiment = tmp_path / "systems.yaml"
    experiment.write_text(json.dumps(MICRO | {"cases": [
        {"system": {"name": names}},
        {"curve": "many", "panel": "loads", "adapters": {"count": 5}, "system": {"host_adapter_bytes": 30_000},
         "measured": {"disk_seconds": 0.001, "groups": {"hot": [0, 2], "cold": [2, 5]}}},
    ]}))  # fmt: skip
    output = tmp_path / "out.jsonl"
    arguments = [str(experiment), "adapters.count=5", "--output", str(output), "--note", "a test"]
    assert runner.main([*arguments, "--picture", str(tmp_path / "x.svg")]) == 1
    *lines, loads = read_results(output).values()
    ours, theirs, base, packed = lines
    assert "out of memory: 5 replicas" in packed["metrics"]["error"]
    assert base["same_tokens"][0] < 12  # without LoRA
    assert theirs["same_tokens"] == [12, 12] and theirs["over"]["curve"] == "slora"
    assert len(theirs["rounds"]) == 2 and theirs["metrics"]["completed"] == 6
    assert ours["note"] == "a test" and theirs["versions"]["peft"]
    assert loads["metrics"]["adapter_loads"] == 0 and loads["rounds"][0]["most_running"] <= 4  # warmed up, kept
    assert loads["metrics"]["cold_first_token_latency"] > 0
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    assert runner.main(arguments) == 1 and len(read_results(output)) == 5  # nothing is repeated


def test_settings_out_of_range_are_refused_by_name():
    for changes, message in (
        ({"measured": {"rounds": 0}}, "measured.rounds=0: must be an integer of at least 1"),
        ({"measured": {"load": 1.5}}, "measured.load=1.5"),
        ({"measured": {"groups": {"hot": [3]}}}, r"measured.groups.hot=\[3\]: must be \[first, last \+ 1\]"),
        ({"mode": "simulated"}, "mode=simulated: has no rounds"),
        ({"mode": "load_test"}, "mode=load_test: the section load_test belongs to"),
        ({"replicas": {"count": 2}}, "mode=real: the section replicas belongs to mode=replicas"),
        ({"workload": MICRO["workload"] | {"used": 9}}, "batch: used=9"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_workload(make_experiment("x", MICRO | changes).runs[0].config)


@pytest.mark.parametrize("mode", ["load_test", "replicas"])
def test_settings_that_started_servers_cannot_honour_are_refused_by_name(mode, tmp_path):
    content = MICRO | {"mode": mode, mode: {}}
    assert make_experiment("x", content).runs
    for changes, message in (
        ({"model": str(tmp_path)}, None if mode == "load_test" else "model=.*: mode=replicas makes random weights"),
        ({"workload": {"kind": "batch"}}, "workload.requests: must be given with mode="),
        ({"workload": {"kind": "synthetic"}}, "workload.kind=synthetic: mode=.* needs one of .*batch"),
        ({"adapters": str(tmp_path)}, "adapters.path=.*: has no effect with mode=.*; leave it out"),
        ({"adapters": {"path": str(tmp_path)}}, "adapters.path=.*: has no effect"),
        ({"adapters": {"count": 0}}, "adapters.count=0: must be at least 1"),
        ({"measured": {"load": 0.5}}, "measured.load=0.5: has no effect"),
        ({"system": {"policy": "fcfs"}}, "system.policy=.*: has no effect"),
        ({"adapters": {"targets": ["q"]}}, "adapters.targets=.*: has no effect" if mode == "load_test" else None),
        ({mode: {"trained": str(tmp_path)}}, "load_test.trained=.*: has 0 PEFT" if mode == "load_test" else "trained"),
    ):
        if message is None:
            make_experiment("x", content | changes)
            continue
        with pytest.raises(ConfigError, match=message):
            make_experiment("x", content | changes)


def test_a_soak_of_no_seconds_is_left_out():
    sides = {"side": ["served", "soak"], "soak_seconds": [0, 5]}
    runs = make_experiment("x", MICRO | {"mode": "load_test", "load_test": sides}).runs
    found = [(run.config.load_test.side, run.config.load_test.soak_seconds) for run in runs]
    assert found == [("served", 0), ("served", 5), ("soak", 5)]


# The committed configs


@pytest.mark.parametrize("file", sorted((CONFIGS / "measured").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_config_says_what_it_shows_and_generates_its_requests(file):
    if file.stem == "serving_smollm2" and smollm2_path() is None:
        pytest.skip("SmolLM2 is not installed")
    experiment = load_experiment(file)
    assert experiment.title != experiment.name and experiment.about.endswith(".")
    assert experiment.metrics and experiment.expected_seconds
    for run in experiment.runs:
        first, second = (run_workload(run.config, number) for number in (0, 1))
        assert len(first) == len(second) > 0
        assert run.config.value(run.x) is not None, run.x


@pytest.mark.parametrize("count", [0, 1, 8, 32, 1000])
def test_a_batch_spreads_its_requests_evenly_whatever_the_adapters(count):
    content = MICRO | {"adapters": {"count": count}, "workload": MICRO["workload"] | {"requests": 64}}
    work = run_workload(make_experiment("x", content).runs[0].config)
    counts = np.unique(work.adapter, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1 and len(counts) == min(64, max(count, 1))
    alone = run_workload(make_experiment("x", content | {"adapters": {"count": 0}}).runs[0].config)
    assert work.prompt_tokens.tolist() == alone.prompt_tokens.tolist()


@pytest.mark.parametrize("spread", ["zipf", "hot"])
def test_a_batch_draws_its_adapters_by_popularity(spread):
    workload = {"kind": "batch", "requests": 20_000, "spread": spread}
    work = run_workload(make_experiment("x", MICRO | {"adapters": {"count": 20}, "workload": workload}).runs[0].config)
    shares = np.bincount(work.adapter, minlength=20) / 20_000
    expected = {"zipf": shares[1:2] * 2, "hot": [0.9]}[spread]
    assert shares[0] == pytest.approx(expected[0], rel=0.1) and min(shares) > 0


def test_a_cycle_of_cold_adapters_repeats_none_within_a_round():
    config = next(config for config in rounds_of("mechanisms.yaml") if config.workload.kind == "bursts")
    for number in (0, 3):
        work = run_workload(config, number)
        cold = work.adapter[work.adapter >= 4]
        assert len(set(cold.tolist())) == len(cold) == 32
    assert set(run_workload(config, 0).arrival) == {0.0} and len(set(work.arrival)) == 2


def test_a_conversation_goes_on_from_round_to_round():
    config = next(config for config in rounds_of("mechanisms.yaml") if config.workload.kind == "chats")
    first, second = (
        {r.prompt: r.adapter for r in engine_requests(run_workload(config, number), 512, config.seed)}
        for number in (0, 1)
    )
    continued = [prompt for prompt in second if prompt[:-24] in first]
    assert continued and all(second[prompt] == first[prompt[:-24]] for prompt in continued)


def test_the_pool_picture_is_drawn(tmp_path):
    history = [np.arange(30) % len(KINDS), np.zeros(30, int)]
    draw(history, tmp_path / "pool.png")
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", ["measured", "beyond"])
def test_systems_beside_each_other_differ_in_one_mechanism_and_have_equal_memory(folder):
    panels = {}
    for run in load_experiment(CONFIGS / folder / "mechanisms.yaml").runs:
        panels.setdefault(run.panel, []).append(run.config.system.settings)
    for panel, systems in panels.items():
        assert len({s["num_tokens"] + s.get("adapter_tokens", 0) for s in systems}) == 1, panel
        differing = {name for one in systems for name in one if any(s.get(name) != one[name] for s in systems)}
        assert differing in ({"prefetch"}, {"prefix_cache"}, {"eviction"}, {"num_tokens", "adapter_tokens"}), panel


def test_counters_show_which_mechanism_was_on(tmp_path):
    """In the first round: later ones find the adapters where it left them."""
    shared = {name: value for name, value in MICRO.items() if name != "workload"}  # other kinds, other arguments
    content = shared | {"measured": {"rounds": 1}, "cases": [
        {"panel": "prefetch", "adapters": {"count": 24},
         "system": {"prefetch": [8, 0], "host_adapter_bytes": 30_000},
         "workload": {"kind": "bursts", "requests": 16, "burst": 16, "cold_share": 0.5, "input_range": [4, 8],
                      "output_range": [8, 9]}},
        {"panel": "eviction", "system": {"eviction": ["lru", "immediate"], "prefix_cache": True},
         "adapters": {"count": 4}, "workload": {"kind": "chats", "requests": 16, "chats": 4, "turns": 2,
                                                "message_tokens": 20, "output_range": [2, 3]}},
    ]}  # fmt: skip
    file, output = tmp_path / "x.yaml", tmp_path / "x.jsonl"
    file.write_text(json.dumps(content))
    assert runner.main([str(file), "--output", str(output)]) == 0
    on, off, lru, immediate = (line["metrics"] for line in read_results(output).values())
    assert on["adapter_loads"] > 0 and off["adapter_loads"] > 0 == off["prefix_hit_tokens"] == on["prefix_hit_tokens"]
    assert on["prefetch_hits"] > 0 == off["prefetch_hits"] == off["prefetches_wasted"]
    assert on["prefetch_hits"] + on["prefetches_wasted"] <= on["adapter_loads"]
    assert immediate["prefix_hit_tokens"] < lru["prefix_hit_tokens"]
    assert immediate["adapter_loads"] > lru["adapter_loads"]


def test_only_adapters_on_disk_are_read_from_disk_in_the_simulator():
    panels = {}
    for run in load_experiment(CONFIGS / "beyond" / "mechanisms.yaml", ["workload.duration=4"]).runs:
        if run.panel.startswith("a10g"):
            panels.setdefault(run.panel, []).append(run_simulated(run.config)["disk_reads"] > 0)
    assert len(panels) == 3
    assert all(reads == len(reads) * ["on disk" in panel] for panel, reads in panels.items()), panels
