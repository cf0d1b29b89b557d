"""A model over several devices in the cost model: its parts against counts, its collectives against the formulas."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import device, random_workload

from slora_jax.errors import ConfigError
from slora_jax.metrics import serving_metrics
from slora_jax.simulation import CostModel, ModelShape, SimulationResult, StepWork, make_system, shard_shape, simulate

MODEL = ModelShape(
    num_layers=3, hidden_size=64, q_width=64, kv_width=32, intermediate_size=160, vocab_size=101, head_dim=8
)
ALL = ("q", "k", "v", "o", "gate", "up", "down")
LATENCY, LINK = 1e-3, 0.5
DEVICE = device().fitted("jax", link=LINK, collective_seconds=LATENCY)
work = st.builds(
    StepWork,
    decode_rows=st.integers(0, 50),
    prefill_rows=st.integers(1, 50),
    sampled=st.integers(1, 50),
    lora_rows=st.integers(1, 50),
    max_rank=st.integers(1, 64),
)


def served(system: str = "slora", adapters: int = 6, **settings: object) -> SimulationResult:
    config = make_system(system, num_tokens=4000, page_size=8, **settings)
    ranks = [8 if i % 2 else 5 for i in range(adapters)]
    return simulate(random_workload(3), config, MODEL, DEVICE, ranks)


def seconds(tp: int, step: StepWork, lora: str = "segmented", layout: str = "slora", collectives: bool = True) -> float:
    """Returns the seconds of the step's collectives."""
    cost = CostModel(shard_shape(MODEL, tp, layout), DEVICE, "jax", lora, collectives)
    return cost.collective_seconds(step)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_every_device_has_its_part_of_weights_and_kv(tp) -> None:
    shard = shard_shape(MODEL, tp)
    assert tp * shard.num_layers * shard.layer_params == pytest.approx(
        MODEL.num_layers * MODEL.layer_params + max(0, tp - 4) * 3 * 2 * 64 * 8  # four KV heads: eight have each twice
    )
    assert tp * shard.head_params == -(-101 // tp) * tp * 64
    assert shard.kv_bytes * min(tp, 4) == MODEL.kv_bytes
    assert shard.whole is MODEL


@pytest.mark.parametrize("tp", [2, 4])
def test_an_adapters_part_is_what_the_layout_says(tp) -> None:
    model = replace(MODEL, lora_targets=ALL)
    hidden, q, kv, mlp = 64, 64, 32, 160
    columns = {"q": q, "k": kv, "v": kv, "gate": mlp, "up": mlp}
    rows = {"o": q, "down": mlp}
    whole_inputs = len(columns) * hidden + sum(rows.values()) / tp
    cut_outputs = sum(columns.values()) / tp
    replicated = whole_inputs + cut_outputs + len(rows) * hidden
    assert shard_shape(model, tp, "replicated").lora_params == 3 * replicated
    for layout in ("slora", "sharded_in"):
        assert tp * shard_shape(model, tp, layout).lora_params == model.lora_params


@pytest.mark.parametrize("tp", [2, 4])
def test_an_adapters_pages_are_those_of_the_engines_layout(tp) -> None:
    """Pages are as many times narrower as the adapter's part is smaller, but for the last row block of each stack."""
    whole = MODEL.adapter_pages(32, 8)
    assert whole <= shard_shape(MODEL, tp).adapter_pages(32, 8) <= whole + 4
    assert shard_shape(MODEL, tp, "replicated").adapter_pages(32, 8) > 1.4 * whole


@given(work, st.sampled_from([2, 4, 8]))
def test_the_base_sends_the_papers_bytes(step, tp) -> None:
    """2 (N - 1) B h / N after o and after down and for the embeddings, and a pair of 4 bytes for each token."""
    sum_of_rows = 2 * (tp - 1) * step.rows * 64 / tp * 2
    sent = (3 * 2 + 1) * sum_of_rows + (tp - 1) * step.sampled * 8
    expected = (3 * 2 + 2) * LATENCY + sent / (LINK * DEVICE.link_bandwidth)
    assert seconds(tp, step, "none") == pytest.approx(expected)
    assert seconds(tp, step, "segmented", collectives=False) == pytest.approx(expected)
    assert seconds(tp, step, "segmented", "replicated") == pytest.approx(expected)


@given(work, st.sampled_from([2, 4, 8]))
def test_adapters_send_the_papers_bytes(step, tp) -> None:
    """5 (N - 1) B r / N of q, k, v, o, in one collective each; 9 of all projections, or 14 with A cut by input, in one
    collective a stack."""
    base, bandwidth = seconds(tp, step, "none"), LINK * DEVICE.link_bandwidth
    dealt = -(-step.max_rank // tp) * tp
    unit = (tp - 1) * step.rows / tp * 2  # bytes for a rank
    published = 3 * dealt + 2 * step.max_rank
    if step.max_rank % tp == 0:
        assert published == 5 * step.max_rank
    assert seconds(tp, step, "mbgmv") - base == pytest.approx(3 * (4 * LATENCY + published * unit / bandwidth))
    every = 5 * dealt + 4 * step.max_rank
    assert seconds(tp, step) - base == pytest.approx(3 * (4 * LATENCY + every * unit / bandwidth))
    summed = seconds(tp, step, layout="sharded_in") - base
    assert summed == pytest.approx(3 * (4 * LATENCY + 14 * step.max_rank * unit / bandwidth))
    assert seconds(tp, replace(step, lora_rows=0)) == pytest.approx(base)


def test_collectives_add_to_a_step_and_to_the_device() -> None:
    step = StepWork(decode_rows=5, decode_context=50, sampled=5, lora_rows=5, row_ranks=40, adapter_ranks=8, max_rank=8)
    for lora in ("none", "segmented", "mbgmv"):
        with_link = CostModel(shard_shape(MODEL, 2), DEVICE, "jax", lora)
        free = CostModel(shard_shape(MODEL, 2), DEVICE.fitted("jax", link=1.0, collective_seconds=0.0), "jax", lora)
        sent = with_link.collective_seconds(step) - free.collective_seconds(step)
        assert sent > 0
        assert with_link.step_seconds(step) - free.step_seconds(step) == pytest.approx(sent)
        assert with_link.busy_seconds(step) - free.busy_seconds(step) == pytest.approx(sent)


def test_one_device_is_as_before_to_the_bit() -> None:
    assert shard_shape(MODEL, 1) is MODEL
    plain, slow_link = served(), device(link_bandwidth=1.0).fitted("jax", collective_seconds=1.0)
    config = make_system(
        "slora", num_tokens=4000, page_size=8, tensor_parallel_size=1, tp_lora="replicated", lora_collectives=False
    )
    other = simulate(random_workload(3), config, MODEL, slow_link, [5, 8] * 3)
    assert [record.token_times for record in plain.records] == [record.token_times for record in other.records]
    assert plain.counters == other.counters


def test_more_devices_are_faster_and_collectives_slower() -> None:
    fast = DEVICE.fitted("jax", collective_seconds=1e-6, link=1.0)
    throughput = []
    for tp in (1, 2, 4):
        config = make_system("slora", num_tokens=4000, page_size=8, tensor_parallel_size=tp)
        result = simulate(random_workload(3), config, MODEL, fast, [5, 8] * 3)
        throughput.append(serving_metrics(result.records, start=0.0).throughput)
    assert throughput[0] < throughput[1] < throughput[2]
    paper = [
        served("slora-paper", tensor_parallel_size=4),
        served("slora-paper", tensor_parallel_size=4, lora_collectives=False),
        served("base-paper", tensor_parallel_size=4),
    ]
    ends = [result.seconds for result in paper]
    assert ends[0] > ends[1] > ends[2]


def test_a_pool_over_several_devices_holds_what_the_weights_parts_leave() -> None:
    system = make_system("slora", gpu_memory_utilization=0.5, prefetch=0, tensor_parallel_size=2)
    shard = shard_shape(MODEL, 2)
    assert system.pool_tokens(MODEL, DEVICE) == int((0.5 * DEVICE.memory_bytes - shard.weight_bytes) / shard.kv_bytes)
    assert shard.weight_bytes < 0.52 * MODEL.weight_bytes


def test_steps_run_at_once_are_the_same_over_several_devices() -> None:
    config = make_system("slora-paper", num_tokens=4000, tensor_parallel_size=4)
    runs = [
        simulate(
            random_workload(5),
            config,
            MODEL,
            DEVICE.fitted("pytorch", collective_seconds=1e-4),
            [8] * 6,
            fast_forward=fast,
        )
        for fast in (True, False)
    ]
    assert runs[0].seconds == pytest.approx(runs[1].seconds)
    assert runs[0].counters.steps == runs[1].counters.steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"tensor_parallel_size": 2, "tp_lora": "rows"}, "tp_lora='rows'"),
        ({"tensor_parallel_size": 2, "replicas": 2}, "replicas=2: must be 1 .*tensor_parallel_size=2"),
        ({"tensor_parallel_size": 2, "lora": "bmm"}, "lora='bmm'"),
        ({"tensor_parallel_size": 2, "merged": True}, "merged=True"),
        ({"tensor_parallel_size": 2, "offline_batch": 6}, "offline_batch=6"),
    ],
)
def test_settings_that_exclude_tensor_parallelism_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_system("slora", **settings)


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads=8"):
        shard_shape(MODEL, 3)
