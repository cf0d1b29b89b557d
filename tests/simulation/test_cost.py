"""The cost model's terms against counts of bytes and operations, matrix by matrix."""

from dataclasses import replace

import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st
from simulated import EFFICIENCY, SHAPE, device
from tiny_model import HF_CONFIG

from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.models.quantised import num_bytes
from slora_jax.simulation import CostModel, ModelShape, StepWork

GQA = ModelShape(num_layers=3, hidden_size=64, q_width=96, kv_width=32, intermediate_size=160, vocab_size=100)
shapes = st.sampled_from([SHAPE, GQA, replace(GQA, lora_targets=("q", "v", "up", "down"), dtype_bytes=4)])
DEVICE = device()


def matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a layer's projections."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    return {
        "q": (hidden, shape.q_width), "k": (hidden, shape.kv_width), "v": (hidden, shape.kv_width),
        "o": (shape.q_width, hidden), "gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden),
    }  # fmt: skip


def lora_elements(shape: ModelShape, rank: int) -> int:
    total = 0
    for _ in range(shape.num_layers):
        for name in shape.lora_targets:
            inputs, outputs = matrices(shape)[name]
            total += rank * inputs + outputs * rank
    return total


@given(shapes, st.integers(1, 64))
def test_sizes_of_a_model(shape, rank) -> None:
    layer = sum(inputs * outputs for inputs, outputs in matrices(shape).values())
    head = shape.vocab_size * shape.hidden_size
    assert shape.weight_bytes == (shape.num_layers * layer + 2 * head) * shape.dtype_bytes
    assert shape.kv_bytes == sum(2 * shape.kv_width * shape.dtype_bytes for _ in range(shape.num_layers))
    assert rank * shape.lora_bytes == lora_elements(shape, rank) * shape.dtype_bytes


@pytest.mark.parametrize(
    ("weights", "code", "groups"), [("int8", 1, {}), ("fp8", 1, {}), ("int4", 0.5, {96: 3, 160: 5})]
)
def test_quantised_layers_are_codes_and_scales_to_read_and_are_multiplied_as_the_others(weights, code, groups) -> None:
    """groups: of one output, by its number of inputs; int4 has groups of 64 and 32 inputs here."""
    shape = replace(GQA, weights=weights)
    layer = sum(
        inputs * outputs * code + 4 * groups.get(inputs, 1) * outputs for inputs, outputs in matrices(shape).values()
    )
    head = shape.vocab_size * shape.hidden_size * 2
    assert shape.weight_bytes == 3 * layer + 2 * head
    seconds = CostModel(shape, DEVICE, "jax", "none").base_seconds
    expected = (3 * layer + head) / (0.8 * DEVICE.memory_bandwidth)
    assert seconds(StepWork(decode_rows=1, sampled=1)) == pytest.approx(expected)
    prompts = StepWork(prefill_rows=10_000)
    assert seconds(prompts) == CostModel(GQA, DEVICE, "jax", "none").base_seconds(prompts)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_sizes_of_quantised_weights_are_those_of_the_engines_parameters(weights) -> None:
    config = replace(ModelConfig.from_dict(HF_CONFIG), weights=weights)
    leaves = traverse_util.flatten_dict(abstract_decoder(config, "bfloat16")[1])
    norms = [path for path in leaves if path[-1] == "scale" and (*path[:-1], "kernel") not in leaves]
    assert len(norms) == 2 * config.num_layers + 1
    assert ModelShape.of(config).weight_bytes == sum(num_bytes(leaves[path]) for path in leaves.keys() - set(norms))


@given(shapes, st.integers(0, 300), st.integers(0, 300), st.integers(0, 50))
def test_the_base_model_is_a_roofline_of_weights_and_products(shape, decode, prefill, sampled) -> None:
    products = read = 0
    for inputs, outputs in list(matrices(shape).values()) * shape.num_layers:
        read += inputs * outputs * shape.dtype_bytes
        products += 2 * inputs * outputs * (decode + prefill)
    if sampled:
        read += shape.vocab_size * shape.hidden_size * shape.dtype_bytes
        products += 2 * shape.vocab_size * shape.hidden_size * sampled
    expected = max(read / (0.8 * DEVICE.memory_bandwidth), products / (0.5 * DEVICE.matmul_flops))
    work = StepWork(decode_rows=decode, prefill_rows=prefill, sampled=sampled)
    assert CostModel(shape, DEVICE, "jax", "none").base_seconds(work) == pytest.approx(expected)


@given(shapes, st.lists(st.integers(1, 100), max_size=5), st.lists(st.tuples(st.integers(0, 50), st.integers(2, 50))))
def test_attention_reads_the_context_of_each_sequence_and_multiplies_each_pair(shape, contexts, chunks) -> None:
    read = sum(2 * shape.kv_width * shape.dtype_bytes for c in contexts for _ in range(c * shape.num_layers))
    pairs = sum(start + i + 1 for start, count in chunks for i in range(count))
    operations = pairs * shape.num_layers * 2 * (2 * shape.q_width)  # q k^T, and its softmax times v
    prompt_read = sum(start + count for start, count in chunks) * shape.kv_bytes
    bandwidth = 0.5 * DEVICE.memory_bandwidth
    expected = read / bandwidth + max(operations / (0.25 * DEVICE.matmul_flops), prompt_read / bandwidth)
    work = StepWork(
        decode_rows=len(contexts), decode_context=sum(contexts), prompts=len(chunks), prefill_pairs=pairs,
        prefill_context=sum(start + count for start, count in chunks),
    )  # fmt: skip
    assert CostModel(shape, DEVICE, "jax", "none").attention_seconds(work) == pytest.approx(expected)


DECODE = [(8, "a"), (8, "a"), (2, "b"), (4, "c"), (8, "a")]
"""(rank, adapter) of each row: runs aa, b, c, a."""
BATCH = StepWork(
    decode_rows=5, decode_context=50, sampled=5, lora_rows=5, row_ranks=30, sequence_ranks=30, segments=4,
    longest_segment=2, adapters=3, adapter_ranks=14, max_rank=8,
)  # fmt: skip


def reading(ranks: float) -> float:
    return lora_elements(SHAPE, 1) * ranks * 2 / (0.5 * DEVICE.memory_bandwidth)


def operations(ranks: float) -> float:
    return 2 * lora_elements(SHAPE, 1) * ranks


def test_segmented_reads_each_adapter_once_and_multiplies_on_the_matrix_units() -> None:
    lora = CostModel(SHAPE, DEVICE, "jax", "segmented").lora
    expected = max(reading(8 + 2 + 4), operations(sum(rank for rank, _ in DECODE)) / (0.5 * DEVICE.matmul_flops))
    assert lora.compute(BATCH) == pytest.approx(expected)


def test_mbgmv_reads_each_adapter_for_each_row_and_multiplies_on_the_vector_units() -> None:
    slow_memory = device(memory_bandwidth=1e6)
    scaled = reading(14 + 0.25 * (8 + 8)) * DEVICE.memory_bandwidth / 1e6
    assert CostModel(SHAPE, slow_memory, "jax", "mbgmv").lora.compute(BATCH) == pytest.approx(scaled)
    slow_vectors = device(vector_flops=1e6)
    by_rows = operations(30) / (0.5 * 1e6)
    assert CostModel(SHAPE, slow_vectors, "jax", "mbgmv").lora.compute(BATCH) == pytest.approx(by_rows)


def test_mbgmm_is_chosen_as_in_the_code_and_pads_to_the_largest_rank() -> None:
    work = StepWork(prompts=2, prefill_rows=350, longest_prompt=250, lora_rows=350, row_ranks=250 * 64 + 100 * 8,
                    sequence_ranks=72, adapters=2, adapter_ranks=72, max_rank=64)  # fmt: skip
    lora = CostModel(SHAPE, DEVICE, "jax", "mbgmv").lora
    assert lora.compute(work) == pytest.approx(operations(350 * 64) / (0.25 * DEVICE.matmul_flops))
    mbgmv = operations(250 * 64 + 100 * 8) / (0.5 * DEVICE.vector_flops)
    for other in ({"longest_prompt": 199}, {"prompts": 1}):
        assert lora.compute(replace(work, **other)) == pytest.approx(mbgmv)
    assert lora.compute(replace(work, max_rank=63)) == pytest.approx(mbgmv)


def test_bmm_pads_every_run_to_the_longest_and_to_the_largest_rank() -> None:
    cost = CostModel(SHAPE, DEVICE, "jax", "bmm")
    runs = 4
    expected = 3 * reading(runs * 8) + operations(runs * 2 * 8) / (0.5 * DEVICE.matmul_flops)
    assert cost.lora.compute(BATCH) == pytest.approx(expected)
    copies = runs * SHAPE.num_layers * 4 * 2
    assert cost.lora.overhead(BATCH) == pytest.approx(copies * 1e-5 + 1e-3)
    plain = CostModel(SHAPE, DEVICE, "jax", "none").step_seconds(BATCH)
    assert cost.step_seconds(BATCH) == pytest.approx(plain + expected + copies * 1e-5 + 1e-3)


def test_a_step_without_adapters_costs_the_same_however_they_are_computed() -> None:
    work = StepWork(decode_rows=5, decode_context=50, sampled=5)
    seconds = {
        CostModel(SHAPE, DEVICE, "jax", lora).step_seconds(work) for lora in ("none", "mbgmv", "bmm", "segmented")
    }
    assert len(seconds) == 1


def test_a_step_takes_its_launches_at_least() -> None:
    slow = DEVICE.fitted("jax", layer_seconds=1.0, lora_layer_seconds=0.5)
    cost = CostModel(SHAPE, slow, "jax", "segmented")
    assert cost.step_seconds(BATCH) == pytest.approx(2 * 1.5 + 1e-4)
    assert cost.step_seconds(StepWork(decode_rows=1, sampled=1)) == pytest.approx(2 * 1.0 + 1e-4)


def test_merging_reads_and_writes_what_the_adapter_changes() -> None:
    changed = sum(inputs * outputs for name, (inputs, outputs) in matrices(SHAPE).items() if name in SHAPE.lora_targets)
    moved = 2 * 2 * changed * SHAPE.num_layers / (0.8 * DEVICE.memory_bandwidth)
    product = 2 * 8 * changed * SHAPE.num_layers / (0.5 * DEVICE.matmul_flops)
    assert CostModel(SHAPE, DEVICE, "jax", "none").merge_seconds(8) == pytest.approx(moved + product)


def test_a_copy_has_its_bytes_and_its_calls() -> None:
    copied = CostModel(SHAPE, DEVICE, "jax", "none").copy_seconds(1e6)
    assert copied == pytest.approx(EFFICIENCY.adapter_load_seconds + 1e6 / (0.5 * DEVICE.host_to_device_bandwidth))


def test_with_pages_of_one_token_an_adapter_takes_four_times_its_rank() -> None:
    assert [SHAPE.adapter_pages(rank, 1) for rank in (8, 16, 64)] == [32, 64, 256]


def test_llama_7b_has_its_published_size() -> None:
    shape = ModelShape(32, 4096, 4096, 4096, 11008, 32000)
    assert shape.params == 6_738_415_616 - 65 * 4096  # the published number without the norms
    assert shape.kv_bytes == 512 * 1024  # of slora.md: 512 KiB a slot
    assert 64 * shape.lora_bytes == 128 * 2**20  # rank 64: 128 MiB


@pytest.mark.parametrize(("software", "lora"), [("java", "none"), ("jax", "magic")])
def test_unknown_names_are_refused(software, lora) -> None:
    with pytest.raises(ConfigError, match=software if software == "java" else lora):
        CostModel(SHAPE, DEVICE, software, lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"lora_targets": ("z",)}, "lora_targets"),
        ({"lora_targets": ()}, "targets"),
    ],
)
def test_a_shape_is_validated(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SHAPE, **change)
