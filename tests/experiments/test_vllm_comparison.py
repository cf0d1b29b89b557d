"""The comparison with vLLM, as far as it goes without vLLM."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from tiny_model import SHARED_PROGRAMS, TinyModel

from experiments.vllm_comparison import compare
from experiments.vllm_comparison.__main__ import main
from experiments.vllm_comparison.settings import QUICK
from experiments.vllm_comparison.worker import slora_worker, vllm_environment
from experiments.workloads import WorkloadRequest
from slora_jax.adapters import random_adapter, write_peft


def test_requests_spread_over_adapters_and_share_prompts_with_the_base_phase():
    base, lora = (compare.make_requests(QUICK, 100, 64, "a-", adapters) for adapters in (0, 32))
    assert [r.prompt for r in base] == [r.prompt for r in lora] and {r.adapter for r in base} == {None}
    names, counts = np.unique([r.adapter for r in lora], return_counts=True)
    assert set(names) == {f"a-{i}" for i in range(32)} and set(counts) == {2}
    assert {r.output for r in base} == {QUICK.output}
    short = compare.short(lora)
    assert max(len(r.prompt) for r in short) <= 8 and [r.adapter for r in short] == [r.adapter for r in lora]


def test_ratios_pair_the_rounds():
    found = compare.ratios([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert found == {"median_of_pairs": 1.0, "of_medians": 2.0, "pairs": [1.0, 3.0, 0.5]}


def test_the_table_has_both_sides_and_the_ratios():
    side = {"tokens_per_second": {"median": 12.5, "rounds": [12.5]}}
    pair = compare.ratios([12.5], [10.0])
    same = {"equal": 5, "of": 6}
    beside = {"slora-jax": side, "vllm": side, "slora-jax over vllm": pair, "requests_with_equal_tokens": same}
    phases = {"base": beside, "lora": beside, "alone": {"base": side, "3": side, "3 adapters over base": pair}}
    text = compare.table({"settings": {"adapters": 3}, "phases": phases})
    assert "base only" in text and "5 of 6 requests" in text and "1.25" in text


def test_a_missing_vllm_is_refused_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vllm_comparison", "--vllm-python", str(tmp_path / "python")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    refusal = capsys.readouterr().err
    assert str(tmp_path / "python") in refusal and "make bench-vllm" in refusal


def test_vllm_gets_all_cores(tmp_path):
    environment = vllm_environment(tmp_path / "bin" / "python", 3)
    assert int(environment["OMP_NUM_THREADS"]) == len(environment["VLLM_CPU_OMP_THREADS_BIND"].split(","))
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_a_slora_worker_answers_with_every_adapter_and_ends_with_its_block(tmp_path, monkeypatch):
    for name, value in SHARED_PROGRAMS.items():
        monkeypatch.setenv(name, value)
    tiny = TinyModel()
    model, adapter = tmp_path / "model", random_adapter(tiny.geometry, 8, ("q", "v"), seed=1)
    model.mkdir()
    tiny.save(model)
    settings = {
        "model": str(model),
        "engine": dataclasses.asdict(tiny.settings(prefix_cache=False)),
        "adapters": {"mixed-0": str(write_peft(tmp_path / "adapter", adapter))},
        "random_adapters": {"prefix": "many-", "count": 2, "rank": 4},
    }
    adapters = ((5, 6, 7), None), ((8, 9), None), ((8, 9), "mixed-0"), ((8, 9), "many-1")
    requests = [WorkloadRequest(0.0, prompt, adapter, 6) for prompt, adapter in adapters]
    with slora_worker(json.loads(json.dumps(settings)), tmp_path / "log") as worker:
        assert {"python", "jax"} <= set(worker.versions)
        side = compare.Side(worker, requests)
        compare.take_turns("test", {"slora-jax": side}, 2, warm_up=compare.short(requests))
        process = worker._process
    assert process.poll() is not None
    first, second = side.answers
    assert first.tokens == second.tokens
    assert len({tuple(tokens) for tokens in first.tokens[1:]}) == 3  # the adapters show
    assert side.values()["tokens_per_second"]["median"] > 0


def test_a_worker_that_fails_is_reported_with_its_log(tmp_path):
    settings = {"model": str(tmp_path / "none"), "engine": {}, "adapters": {}, "random_adapters": {"count": 0}}
    expected = pytest.raises(RuntimeError, match="(?s)a worker ended with status 1.*none")
    with expected, slora_worker(settings, tmp_path / "log"):
        pass
