"""The Triton kernels of the gradients at real sizes, compiled for absent GPUs, and a layer of a training step."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_shapes import LAYERS

from pallas_kernels import devices, plans
from pallas_kernels.bench.models import LLAMA_3_8B, Model
from pallas_kernels.lora import AdapterTable, LoraTiles
from pallas_kernels.lora.training import TrainedLora, training_tile_rows
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from slora_jax.analysis import kernels_in
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.training.programs import TrainingPrograms

ROWS, SLOTS, NUM_PAGES = 4096, 64, 4000
SHARD_OF_70B = LAYERS[3]
SMALL = Model("small", 512, 8, 4, 64, 1408, num_layers=1, vocab=1000, max_tokens=2048)
# (model, stack, largest rank, page size): each plan, several projections and one, a pool that has narrower blocks.
CALLS = [(LLAMA_3_8B, 2, 64, 16), (LLAMA_3_8B, 0, 16, 16), (LLAMA_3_8B, 1, 32, 32), (SHARD_OF_70B, 0, 32, 8)]


def struct(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def step_structs(layout, max_rank, rows, tile_rows):
    """The table of adapters and the row tiles of a micro-step."""
    table = AdapterTable(struct(SLOTS, int(layout.num_pages(np.full(7, max_rank)))), struct(SLOTS, 7))
    return table, LoraTiles(*(struct(rows // tile_rows) for _ in range(3)), struct(0), *(struct() for _ in range(4)))


@pytest.mark.parametrize("name", TARGETS)
def test_no_plan_spills_and_the_gradient_is_updated_in_place(name):
    """On an L4, whose code is that of an A100 and whose shared memory is smaller, only the largest ranks. XLA
    assigns the same buffers on all devices."""
    device, calls = devices.DEVICES[name], CALLS[:1] if name == "l4" else CALLS
    with devices.compiling_for(device):
        tile_rows = training_tile_rows(LLAMA_3_8B.layout(), "bfloat16", 2048)

    def run(befores, arguments):
        results = []
        for (model, stack, max_rank, page_size), before, call in zip(calls, befores, arguments, strict=True):
            (table, tiles), x, dy, pool = call
            layout = model.layout(page_size)
            lora = TrainedLora(layout, table, tiles, dtype=x.dtype, tile_rows=tile_rows, max_rank=max_rank)
            product = lambda x, y, ledger: lora(x, y, pool, ledger, layout.stacks[stack])  # noqa: B023, E731
            dx, _, after = jax.vjp(product, x, jnp.zeros_like(dy), jnp.zeros_like(before))[1]((dy, before))
            results.append((after, dx))
        return results

    def arguments(model, stack, max_rank, page_size):
        layout = model.layout(page_size)
        own = layout.stacks[stack]
        pool = struct(NUM_PAGES, 2, page_size, layout.width, dtype="bfloat16")
        x, dy = (struct(ROWS, d, dtype="bfloat16") for d in (own.d_in, own.d_out))
        return step_structs(layout, max_rank, ROWS, tile_rows), x, dy, pool

    inputs = [arguments(*call) for call in calls]
    befores = [struct(*pool.shape, dtype="float32") for *_, pool in inputs]
    make = compile_for if name == "h200" else lower_for
    program = make(TARGETS[name], jax.jit(run, donate_argnums=0), befores, inputs)
    if name == "h200":
        assert program.memory_analysis().alias_size_in_bytes == sum(4 * before.size for before in befores)
        hlo = program.as_text()
        assert not [line for line in hlo.splitlines() if re.search(rf"f32\[{NUM_PAGES},.*\bcopy", line)]
    uses = kernels_in(program, device)
    by_name = {name: sum(u.count for u in uses if u.name == name) for name in {u.name for u in uses}}
    assert by_name == {f"lora_{op}_kernel": len(calls) for op in ("shrink", "expand", "gradient_a", "gradient_b")}
    for use in uses:
        if "gradient" in use.name:
            print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
            assert use.spill_bytes == 0, use
            assert use.registers <= 255 and use.shared_bytes <= device.shared_bytes, use
            assert "cp.async.cg.shared.global" in use.ptx, f"{use.name}: rows are not loaded 16 bytes at once"
            assert ("wgmma.mma_async" if name == "h200" else "mma.sync") in use.ptx, f"{use.name}: no tensor cores"
            assert not re.search(r"\b(atom|red)\.", use.ptx), f"{use.name}: atomics"


def test_every_plan_is_compiled():
    compiled = [rank * projections for _, stack, rank, _ in CALLS for projections in (1, (3, 1, 2, 1)[stack])]
    for entry in plans._table("lora"):
        if entry["op"] == "lora_gradient":
            assert any(plans._fits(entry["when"], {"rank": rank}) for rank in compiled), entry


@pytest.mark.parametrize("remat", [False, True])
def test_a_layers_gradient_is_accumulated_in_place(remat):
    """The only temporary of the pool's size is the cast of its weights to the model's dtype."""
    config = ModelConfig.from_dict(SMALL.config())
    geometry, pages, rows, length = adapter_geometry(config, 16), 20_000, 2, 512
    params = abstract_decoder(config, jnp.bfloat16)[1]
    programs = TrainingPrograms(config, geometry.layout, params, 16, remat)
    master = struct(pages, 2, 16, config.kv_width, dtype="float32")
    scale, x = struct(pages, 2, 16, 1, dtype="float32"), struct(rows * length, config.hidden_size, dtype="bfloat16")
    angles = struct(rows * length, 1, config.head_dim // 2, dtype="float32")
    with devices.compiling_for(devices.DEVICES["h200"]):
        tile_rows = training_tile_rows(geometry.layout, programs.dtype, length)
        table, tiles = step_structs(geometry.layout, 16, rows * length, tile_rows)
        lora = jax.eval_shape(partial(programs.prepare, tile_rows=tile_rows), table, tiles)
        inputs = params["layers"][0], master, scale, x, ((angles, angles),), struct(rows, length), lora
        _, backward = jax.eval_shape(partial(programs.layer, kind=config.kind(0), backward=True), *inputs)
    program = compile_for(TARGETS["h200"], programs.layer_gradient, backward, x, master)
    memory, cast = program.memory_analysis(), 2 * master.size
    assert memory.alias_size_in_bytes == 4 * master.size + 2 * x.size
    assert cast <= memory.temp_size_in_bytes < 1.5 * cast
    uses = kernels_in(program, devices.DEVICES["h200"])
    assert sum(use.count for use in uses if "lora_gradient" in use.name) == 8
    assert sum(use.count for use in uses if use.name == "lora_shrink_kernel") == (4 if remat else 0)
