"""The Triton LoRA kernels at real sizes, compiled for absent GPUs: spills, tensor cores and copies in the machine code.

Spills depend on a kernel's plan, its dtype and the pool's layout, so every entry of the plan table is compiled once per
device, with the models in turn.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_shapes import LAYERS

from experiments.kernel_bench import compiled_lora
from pallas_kernels import devices, plans
from pallas_kernels.bench.models import Model
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles, lora_tile_rows
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from slora_jax.analysis import kernels_in

SLOTS, NUM_PAGES = 256, 4000


@dataclass(frozen=True)
class Call:
    """One stack's product in a step of `rows` rows; every row is a sequence of its own if `decode`."""

    model: Model
    stack: int
    rows: int
    decode: bool
    page_size: int = 16
    dtype: str = "bfloat16"
    max_rank: int = 64
    pool_dtype: str | None = None

    @property
    def layout(self):
        return self.model.layout(self.page_size)

    def plans(self) -> list[dict]:
        """The plan table's entries for the shrink and the expand kernel."""
        layout, stack = self.layout, self.layout.stacks[self.stack]
        facts = {"decode": self.decode, "rows": self.rows, "width": layout.width}
        entries = {"lora_shrink": {"d_in": stack.d_in}, "lora_expand": {"d_out": stack.d_out}}
        return [plans.find("lora", op, **facts, **more) for op, more in entries.items()]


# Stack 0 has three projections of unequal width, stack 3 the longest input; the shard of eight has smaller blocks.
LLAMA_7B, LLAMA_13B, LLAMA_3_8B, SHARD_OF_70B, QWEN3_8B = LAYERS
CALLS = {
    "h200": [
        Call(LLAMA_3_8B, 0, 8, True), Call(QWEN3_8B, 0, 256, True), Call(SHARD_OF_70B, 0, 256, True),
        Call(LLAMA_7B, 3, 256, True), Call(LLAMA_13B, 0, 256, False), Call(LLAMA_3_8B, 3, 8192, False),
    ],
    "a100": [
        Call(LLAMA_7B, 0, 8, True), Call(LLAMA_3_8B, 3, 256, True),
        Call(QWEN3_8B, 2, 256, True), Call(SHARD_OF_70B, 0, 2048, False), Call(LLAMA_13B, 3, 8192, False),
    ],
    # An A100's plans and nearly its code, with less shared memory: those that take most of it.
    "l4": [Call(LLAMA_13B, 0, 256, True), Call(LLAMA_7B, 3, 8192, False)],
}  # fmt: skip
OTHERS = [
    Call(LLAMA_3_8B, 0, 256, decode, page_size, dtype, max_rank=256, pool_dtype=pool_dtype)
    for page_size, dtype, pool_dtype in ((8, "bfloat16", "uint16"), (32, "bfloat16", None), (16, "float16", None))
    for decode in (True, False)
]


def check(device, calls, buffers=False):
    """Lowers the calls as one program, every y donated, and checks its kernels, or compiles it and checks its buffers
    too."""

    def struct(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    with devices.compiling_for(device):
        tile_rows = [lora_tile_rows(call.layout, call.dtype, decode=call.decode) for call in calls]

    def arguments(call, tile_rows):
        stack, layout = call.layout.stacks[call.stack], call.layout
        table = AdapterTable(struct(SLOTS, int(layout.num_pages(np.full(7, call.max_rank)))), struct(SLOTS, 7))
        num_tiles = ceil_div(call.rows, tile_rows) + min(call.rows, SLOTS)
        tiles = LoraTiles(*(struct(num_tiles) for _ in range(3)), struct(call.rows), *(struct() for _ in range(4)))
        pool = struct(NUM_PAGES, 2, call.page_size, layout.width, dtype=call.pool_dtype or call.dtype)
        return table, tiles, struct(call.rows, stack.d_in, dtype=call.dtype), pool

    def run(ys, arguments):
        outputs = []
        for call, height, y, (table, tiles, x, pool) in zip(calls, tile_rows, ys, arguments, strict=True):
            static = {"decode": call.decode, "tile_rows": height, "max_rank": call.max_rank}
            lora = LoraProduct(call.layout, table, tiles, dtype=call.dtype, **static)
            outputs.append(lora(x, y, pool, call.layout.stacks[call.stack]))
        return outputs

    ys = [struct(call.rows, call.layout.stacks[call.stack].d_out, dtype=call.dtype) for call in calls]
    inputs = list(map(arguments, calls, tile_rows))
    make = compile_for if buffers else lower_for
    program = make(TARGETS[device.name], jax.jit(run, donate_argnums=0), ys, inputs)
    if buffers:
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == sum(2 * y.size for y in ys)  # the outputs take over the buffers
        assert " copy(" not in program.as_text() and "copy-start" not in program.as_text()
    uses, with_wgmma = kernels_in(program, device), 0
    by_name = {name: sum(u.count for u in uses if u.name == name) for name in {u.name for u in uses}}
    assert by_name == {"lora_shrink_kernel": len(calls), "lora_expand_kernel": len(calls)}
    for use in uses:
        print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
        assert use.backend == "triton"
        assert use.spill_bytes == 0, use
        assert use.registers <= 255 and use.shared_bytes <= device.shared_bytes, use
        wide = "cp.async.cg.shared.global" if use.name == "lora_shrink_kernel" else "ld.global.v4"
        assert wide in use.ptx, f"{use.name}: the weights are not loaded 16 bytes at once"
        with_wgmma += use.count if "wgmma.mma_async" in use.ptx else 0
        assert "wgmma.mma_async" in use.ptx or "mma.sync" in use.ptx, f"{use.name}: no tensor cores"
        assert not re.search(r"\b(atom|red)\.", use.ptx), f"{use.name}: atomics"
    mixed = sum(not call.decode for call in calls)
    assert with_wgmma == (2 * mixed if device.compute_capability == 90 else 0)


@pytest.mark.parametrize("name", CALLS)
def test_no_plan_spills_and_outputs_are_updated_in_place(name):
    """XLA assigns the same buffers on all devices."""
    check(devices.DEVICES[name], CALLS[name], buffers=name == "h200")


def test_no_other_page_size_or_dtype_spills():
    check(devices.DEVICES["h200"], OTHERS)


def test_decode_kernels_execute_few_instructions_and_few_blocks_are_idle():
    """The targets hold with all of a program's instructions, not only those of its loops."""
    stack, *_ = compiled_lora.LAYOUT.stacks
    rows = list(compiled_lora.rows(devices.DEVICES["h200"], stacks=[stack]))
    assert {(row["kernel"], row["launches"]) for row in rows} == {("lora_shrink", 1), ("lora_expand", 1)}
    for row in rows:
        if row["case"].startswith("decode"):
            assert row["instructions_per_kb"] <= {"lora_shrink": 40, "lora_expand": 90}[row["kernel"]], row
            assert row["dead_blocks"] <= row["blocks"] / 8, row
        assert row["dead_blocks"] <= row["blocks"] * 0.4, row


@pytest.mark.parametrize("name", ["h200", "a100"])
def test_every_plan_of_a_device_is_compiled(name):
    with devices.compiling_for(devices.DEVICES[name]):
        compiled = [one for call in CALLS[name] for one in call.plans()]
    for entry in plans._table("lora"):
        if entry["op"] in ("lora_shrink", "lora_expand"):
            assert entry["plan"] in compiled, entry
