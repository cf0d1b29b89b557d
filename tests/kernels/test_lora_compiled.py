"""The Triton LoRA kernels at real sizes, compiled for GPUs that are not there: what the machine code says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_shapes import LAYERS

from pallas_kernels import devices
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles, lora_tile_rows
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.analysis import kernels_in

SLOTS, NUM_PAGES = 256, 4000
STEPS = {"decode-256": (256, True), "mixed-2048": (2048, False)}
OTHER_STEPS = {"decode-8": (8, True), "mixed-256": (256, False), "mixed-8192": (8192, False)}


def compiled(layer, device, rows, decode, page_size=16, dtype="bfloat16", max_rank=64, numbers=range(4)):
    """A layer's stacks of these numbers as one program, every y donated."""
    layout = layer.layout(page_size)
    stacks = [layout.stacks[number] for number in numbers]

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def ints(*shape):
        return struct(*shape, dtype="int32")

    with devices.compiling_for(device):
        tile_rows = lora_tile_rows(layout, dtype, decode=decode)

    def run(table, tiles, xs, ys, pool):
        lora = LoraProduct(layout, table, tiles, dtype=dtype, decode=decode, tile_rows=tile_rows, max_rank=max_rank)
        return [lora(x, y, pool, stack) for x, y, stack in zip(xs, ys, stacks, strict=True)]

    num_tiles = ceil_div(rows, tile_rows) + min(rows, SLOTS)
    table = AdapterTable(ints(SLOTS, int(layout.num_pages(np.full(7, max_rank)))), ints(SLOTS, 7))
    tiles = LoraTiles(*(ints(num_tiles) for _ in range(3)), ints(rows), *(ints() for _ in range(4)))
    xs = [struct(rows, s.d_in) for s in stacks]
    ys = [struct(rows, s.d_out) for s in stacks]
    pool = struct(NUM_PAGES, 2, page_size, layer.width)
    return compile_for(TARGETS[device.name], jax.jit(run, donate_argnums=3), table, tiles, xs, ys, pool)


def check(program, device, decode, stacks=4):
    uses = kernels_in(program, device)
    by_name = {name: sum(u.count for u in uses if u.name == name) for name in {u.name for u in uses}}
    assert by_name == {"lora_shrink_kernel": stacks, "lora_expand_kernel": stacks}
    for use in uses:
        assert use.backend == "triton"
        assert use.spill_bytes == 0, use
        assert use.registers <= 255 and use.shared_bytes <= device.shared_bytes, use
        assert "cp.async.cg.shared.global" in use.ptx, f"{use.name}: no 16-byte asynchronous copies"
        tensor_cores = "wgmma.mma_async" if device.compute_capability == 90 and not decode else "mma.sync"
        assert tensor_cores in use.ptx, f"{use.name}: no {tensor_cores}"
        assert not re.search(r"\b(atom|red)\.", use.ptx), f"{use.name}: atomics"
    return uses


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_no_kernel_spills_at_real_sizes(layer, device):
    for name, (rows, decode) in STEPS.items():
        # The two stacks that differ most: three projections of unequal width, and the longest input.
        program = compiled(layer, device, rows, decode, numbers=(0, 3))
        for use in check(program, device, decode, stacks=2):
            print(name, use.name, use.registers, "registers", use.shared_bytes, "bytes shared")


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_no_kernel_spills_in_the_smallest_and_largest_steps(name):
    device, (rows, decode) = devices.DEVICES["h200"], OTHER_STEPS[name]
    check(compiled(LAYERS[2], device, rows, decode), device, decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize(("page_size", "dtype"), [(8, "bfloat16"), (32, "bfloat16"), (16, "float16")])
def test_other_page_sizes_and_types_do_not_spill_either(page_size, dtype, decode):
    device = devices.DEVICES["h200"]
    check(compiled(LAYERS[2], device, 256, decode, page_size, dtype, max_rank=256), device, decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_the_outputs_take_over_the_buffers_of_the_base_products(decode):
    rows = 256
    program = compiled(LAYERS[2], devices.DEVICES["h200"], rows, decode)
    outputs = 2 * rows * sum(stack.d_out for stack in LAYERS[2].layout().stacks)
    assert program.memory_analysis().alias_size_in_bytes == outputs
    assert " copy(" not in program.as_text() and "copy-start" not in program.as_text()
