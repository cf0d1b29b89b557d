"""The choice of a step's implementation, and the warning when the planned one does not serve the shape."""

from functools import partial

import jax.numpy as jnp
import pytest

from pallas_kernels import devices, plans
from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraProduct, LoraTiles, lora_tile_rows
from pallas_kernels.lora.api import backend
from pallas_kernels.lora.plan import expand_plan, shrink_plan
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention
from slora_jax.engine.step_spec import StepSpec

H200 = devices.DEVICES["h200"]


def attention(**changes) -> PagedAttention:
    ints = jnp.zeros(2, jnp.int32)
    tiles = AttentionTiles(jnp.zeros((2, 4), jnp.int32), *(ints,) * 3, ints[:0], ints[:0], ints[0], ints, ints[0])
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "dtype": "bfloat16"}
    return PagedAttention(tiles, **(shape | {"decode": True, "tile_rows": 2} | changes))


def layout_of(width: int) -> LoraLayout:
    return decoder_layout(width, width, width, width, 16)


def product(width: int, **changes) -> LoraProduct:
    ints = jnp.zeros(3, jnp.int32)
    table, tiles = (
        AdapterTable(jnp.zeros((2, 9), jnp.int32), jnp.zeros((2, 7), jnp.int32)),
        LoraTiles(*(ints,) * 4, *(ints[0],) * 4),
    )
    static = {"dtype": "bfloat16", "decode": True, "tile_rows": 3, "max_rank": 8}
    return LoraProduct(layout_of(width), table, tiles, **(static | changes))


def test_cpus_and_float32_use_the_reference_and_gpus_the_planned_kernel():
    layout = layout_of(32)
    assert backend(layout, "bfloat16") == "xla"
    with devices.compiling_for(H200):
        assert backend(layout, "float32") == "xla"
        assert backend(layout, "bfloat16") == backend(layout, "float16") == "triton"
    assert devices.target() is None


def test_shapes_unsupported_by_the_planned_kernel_fall_back_with_a_warning():
    with devices.compiling_for(H200):
        with pytest.warns(UserWarning, match="attention by the XLA reference.*head_dim 96"):
            attention(head_dim=96)
        for split in (False, True):
            with pytest.warns(UserWarning, match="LoRA by the XLA reference.*width that is a multiple of 16, not 24"):
                product(24, split=split)


@pytest.mark.parametrize("split", [False, True])
def test_lora_tile_rows_match_the_backend_that_runs(split):
    height = partial(lora_tile_rows, dtype="bfloat16", decode=False, split=split)
    with devices.compiling_for(H200):
        assert height(layout_of(32)) == height(layout_of(32), implementation="triton")
        with pytest.warns(UserWarning, match="LoRA by the XLA reference"):
            assert height(layout_of(24)) == height(layout_of(24), implementation="xla")
        assert height(layout_of(24), implementation="xla") != height(layout_of(32), implementation="triton")


def test_shapes_unsupported_by_a_named_kernel_are_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="head_dim 96"):
        attention(head_dim=96, implementation="triton")
    with pytest.raises(NotImplementedError, match="no implementation named 'cuda'"):
        attention(implementation="cuda")
    with pytest.raises(NotImplementedError, match="float32"):
        product(32, dtype="float32", implementation="triton")
    with pytest.raises(NotImplementedError, match="'triton' takes a pool width that is a multiple of 16, not 24"):
        product(24, implementation="triton")


def test_a_mosaic_gpu_engine_runs_decode_attention_lora_and_experts_with_triton():
    spec = StepSpec(None, None, None, None, max_num_seqs=1, max_pages_per_seq=1, max_rank=8, kernels="mosaic_gpu")
    assert spec.attention_kernels(decode=False) == "mosaic_gpu"
    assert spec.attention_kernels(decode=True) == spec.lora_kernels == spec.expert_kernels == "triton"


def test_a_product_is_called_whole_or_split_as_it_was_made():
    (stack, *_), ones = layout_of(32).stacks, jnp.ones((3, 32))
    with pytest.raises(ValueError, match="split=False; shrink and expand need split=True"):
        product(32).shrink(ones, ones, stack)
    with pytest.raises(ValueError, match="split=True; the whole product needs split=False"):
        product(32, split=True)(ones, ones, ones, stack)


def test_the_first_fitting_plan_of_the_device_or_of_any_applies():
    facts = {"decode": True, "width": 1024, "page_size": 16}
    with devices.compiling_for(H200):
        small, large = (shrink_plan(**facts, rows=rows, d_in=4096) for rows in (8, 256))
        assert small.splits(4096) > large.splits(4096)  # few rows leave room for more programs a row
        assert expand_plan(**facts | {"width": 64}, rows=8, d_out=4096).block_n <= 64
        with pytest.raises(LookupError, match="no plan of lora_fold on h200"):
            plans.find("lora", "lora_fold", **facts)


@pytest.mark.parametrize(
    ("kind", "capability", "name"),
    [
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA L4", 89, "l4"),
        ("NVIDIA L40S", 89, "l4"),
        ("NVIDIA H100 80GB HBM3", 90, "h200"),
        ("NVIDIA A10G", 86, "l4"),
        ("NVIDIA B200", 100, "a100"),
        ("Tesla V100-SXM2-16GB", 70, None),
    ],
)
def test_an_unknown_gpu_uses_the_plans_of_a_compatible_one(kind, capability, name):
    device = devices.known_device(kind, capability)
    assert (device and device.name) == name


def test_every_entry_of_the_tables_can_be_reached():
    """An entry after one that fits all of its cases would never be used."""
    for folder in ("experts", "lora", "paged_attention"):
        table = plans._table(folder)
        for i, entry in enumerate(table):
            for earlier in table[:i]:
                if (earlier["op"], earlier["device"]) == (entry["op"], entry["device"]):
                    assert not _covers(earlier["when"], entry["when"]), (folder, entry)


def _covers(wide: dict, narrow: dict) -> bool:
    def within(a, b):  # b within a
        if not isinstance(a, list):
            return a == b
        if not isinstance(b, list):
            return False
        low = a[0] is None or (b[0] is not None and b[0] >= a[0])
        return low and (a[1] is None or (b[1] is not None and b[1] <= a[1]))

    return all(fact in narrow and within(value, narrow[fact]) for fact, value in wide.items())
