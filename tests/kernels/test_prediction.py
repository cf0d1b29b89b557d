"""Predicted times against a review of the compiled kernels, and the command that prints them."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from experiments.kernel_bench import __main__ as command
from experiments.kernel_bench.compiled import RESULTS
from pallas_kernels.bench.models import LLAMA_3_8B
from pallas_kernels.bench.predict import backward_calls, lora_call, prefill_call
from pallas_kernels.devices import compiling_for
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape
from pallas_kernels.paged_attention.roofline import attention_call
from pallas_kernels.prediction import Call, KernelCost, Prediction, floor_seconds, kernel_cost, predict
from pallas_kernels.roofline import Work
from pallas_kernels.targets import TARGETS

H200 = TARGETS["h200"]
on_h200 = partial(predict, device=H200.device, clock=H200.clock_ghz * 1e9)

OLD = {
    "lora_shrink": KernelCost(round_trips=3, instructions_per_kb=124, warps=2, per_sm=4),
    "lora_expand": KernelCost(round_trips=3, instructions_per_kb=184, warps=4, per_sm=4),
}
"""The kernels before there was one program per tile."""

# Llama-3-8B, 64 rows of 64 adapters of rank 16: µs a layer in the review, of the old kernels and of the present ones.
REVIEW = {
    ("qkv", "lora_shrink"): (9.9, 7.6), ("qkv", "lora_expand"): (6.7, 5.0),
    ("o", "lora_shrink"): (5.5, 4.0), ("o", "lora_expand"): (5.5, 4.0),
    ("gate_up", "lora_shrink"): (7.7, 5.8), ("gate_up", "lora_expand"): (20.8, 16.5),
    ("down", "lora_shrink"): (11.2, 8.7), ("down", "lora_expand"): (5.7, 4.2),
}  # fmt: skip


@pytest.mark.parametrize(("stack", "op"), REVIEW, ids=[" ".join(key) for key in REVIEW])
def test_lora_is_predicted_as_in_the_review(stack, op):
    layout = LLAMA_3_8B.layout()
    stack = next(s for s in layout.stacks if s.name == stack)
    ranks, counts = np.full((64, 7), 16), np.ones(64, int)
    call = lora_call(op, layout, stack, ranks, counts, 8, kernel_cost(op, "decode"))
    parts = ceil_div(stack.d_in, 1024) if op == "lora_shrink" else sum(ceil_div(d, 1024) for d in stack.d_outs)
    old = replace(call, programs=64 * parts, cost=OLD[op])
    now, after = REVIEW[stack.name, op]
    assert 1e6 * on_h200(old).seconds == pytest.approx(now, rel=0.2)
    assert 1e6 * on_h200(call).seconds == pytest.approx(after, rel=0.2)


@pytest.mark.parametrize("op", ["lora_shrink", "lora_expand"])
def test_prefill_has_the_instructions_of_the_compiled_kernels(op):
    compiled = {row["case"]: row["instructions_per_kb"] for row in json.loads(RESULTS.read_text())
                if (row["kernel"], row["version"], row["device"]) == (op, "new", "h200")}  # fmt: skip
    layout, counts = LLAMA_3_8B.layout(), np.full(64, 64)
    for stack, rank in ((stack, rank) for stack in layout.stacks for rank in (16, 64)):
        with compiling_for(H200.device):
            call = prefill_call(op, layout, stack, np.full((64, 7), rank), counts, 64, kernel_cost(op, "prefill"))
        columns = len(stack.projections) * stack.d_in if op == "lora_shrink" else stack.d_out
        found = call.cost.instructions_per_kb * call.kilobytes + call.cost.instructions_per_item * call.programs
        expected = compiled[f"prefill rows=4096 adapters=64 rank={rank} {stack.name}"]
        assert found / (64 * rank * columns * 2 / 1024) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("adapters", "floor", "predicted"), [(1, 240, 710), (8, 260, 340), (64, 430, 510)])
def test_the_backward_pass_of_training_is_predicted_as_documented(adapters, floor, predicted):
    """A layer of Llama-3-8B, 4,096 rows, rank 16, in µs; one adapter has too few programs."""
    layout, ranks, counts = LLAMA_3_8B.layout(), np.full((adapters, 7), 16), np.full(adapters, 4096 // adapters)
    with compiling_for(H200.device):
        calls = [call for stack in layout.stacks for call in backward_calls(layout, stack, ranks, counts, 16).items()]
    work = sum((call.works[0] for name, call in calls if name != "sums"), Work())
    assert 1e6 * floor_seconds(work, H200.device) == pytest.approx(floor, rel=0.05)
    assert 1e6 * sum(on_h200(call).seconds for _, call in calls) == pytest.approx(predicted, rel=0.05)


def test_attention_and_writes_are_predicted_as_in_the_review():
    shape = AttentionShape(32, 8, 128, 16, np.dtype("bfloat16"), 64, 2048, 64, True)
    with compiling_for(H200.device):
        call = attention_call(np.ones(64, int), np.full(64, 4095), shape)
    assert 1e6 * on_h200(replace(call, programs=1024)).seconds == pytest.approx(325, rel=0.2)
    assert 250 < 1e6 * on_h200(call).seconds < 280
    write = Call((Work(bytes=2 * 2 * 64 * 1024 * 2),), kernel_cost("write_kv", "write"))
    assert 1e6 * on_h200(write).seconds == pytest.approx(2.2, rel=0.2)


def test_each_bound_is_named():
    work = Work(bytes=4_300_000_000)  # 1 ms
    cost = KernelCost(instructions_per_kb=54, per_sm=3)
    for call, bound, milliseconds in (
        (Call((work,), cost), "bandwidth", 1),
        (Call((work,), replace(cost, launches=5000)), "launch", 6),
        (Call((Work(bytes=work.bytes, flops=int(989e12 * 3e-3)),), replace(cost, matmul=0.5)), "matmul", 6),
        (Call((work,), replace(cost, instructions_per_kb=540), 396_000, work.bytes / 1024), "issue", 3.94),
        (Call((work,), replace(cost, steady=True), 400, work.bytes / 1024), "waves", 1.98),
        (Call((work,), cost, 400, work.bytes / 1024), "waves", 1.32),
        (Call((work,), cost, 33, work.bytes / 1024), "waves", 4),
        (Call((work,), replace(cost, item_round_trips=4), 396_000, work.bytes / 1024), "latency", 2.524),
        (Call((work,), replace(cost, instructions_per_item=4356), 396_000), "issue", 3),
    ):
        predicted = on_h200(call)
        assert predicted.bound == bound
        assert predicted.seconds == pytest.approx(milliseconds * 1e-3, rel=0.01)


def test_predictions_add_up_by_bound():
    total = Prediction({"launch": 1.0, "issue": 3.0}) + Prediction({"launch": 1.0, "bandwidth": 4.0}) * 2
    assert (total.parts, total.seconds, total.bound) == (
        {"launch": 3.0, "issue": 3.0, "bandwidth": 8.0},
        14,
        "bandwidth",
    )


def test_predict_prints_floor_prediction_and_bound_of_every_case(tmp_path, capsys, monkeypatch):
    out, sections = tmp_path / "predicted.json", command._sections(command._parser().parse_args([]), False)
    monkeypatch.setattr(command, "_sections", lambda *_: sections)
    assert command.main(["--predict", "h200", "--out", str(out)]) == 0
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    assert content["predicted_for"] == "h200" and content["command"].endswith(str(out))
    predicted = {(row["label"], row["system"]): row for row in content["rows"]}
    assert len(predicted) == len(content["rows"])
    for label, row in ((row["label"], row) for row in content["rows"]):
        assert (
            row["predicted_seconds"] > row["floor_seconds"] > 0 and f" {row['bound']}" in printed and label in printed
        )
    for case in (case for cases in sections.values() for case in cases):
        system = {"step": "base", "write_kv": "xla", "write_pages": "xla", "sampler": "temperature"}.get(
            case.op, "triton"
        )
        if not case.is_check and case.op != "ceiling" and "alone" not in case.facts:
            assert (case.label, system) in predicted
    prefill = predicted["lora prefill model=llama-3-8b rows=4096 adapters=64 rank=16", "triton"]
    assert 1e6 * prefill["floor_seconds"] == pytest.approx(253, rel=0.02)  # the review's, like the next two
    assert 1e6 * prefill["predicted_seconds"] == pytest.approx(400, rel=0.1) and prefill["bound"] == "latency"
    prompt = predicted["attention prefill model=llama-3-8b rows=4096 sequences=one prompt", "triton"]
    assert 0.35 < prompt["flops"] / prompt["predicted_seconds"] / H200.device.matmul_flops < 0.45
    steps = "step decode model=llama-3-8b batch=64 context=512 rank=16"
    base, lora = (predicted[steps, system]["predicted_seconds"] for system in ("base", "64 adapters"))
    assert 1e3 * base == pytest.approx(6.6, rel=0.2) and 1.15 < lora / base < 1.4
