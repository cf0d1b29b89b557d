"""The Triton attention kernel at real sizes, compiled for absent GPUs: spills, tensor cores and copies in the machine
code.

Every entry of the plan table is compiled once per device, with head shapes and query groups in turn. XLA's own code
beside the kernels is compiled where it is looked at.
"""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices, plans
from pallas_kernels.kv_format import ScaledPages
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from slora_jax.analysis import kernels_in

SEQS, MAX_PAGES, NUM_PAGES, TILE_ROWS = 64, 2048, 4000, 64

LLAMA_7B, LLAMA_3_8B, SHARD_OF_70B, QWEN3_30B_A3B = (32, 32, 128), (32, 8, 128), (8, 1, 128), (32, 4, 128)


@dataclass(frozen=True)
class Call:
    """One layer's attention `(heads, KV heads, head_dim)` in a step of `rows` rows; without prefill if `decode`."""

    heads: tuple[int, int, int]
    decode: bool
    rows: int = SEQS
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    kv_dtype: str | None = None

    @property
    def pool(self):
        (_, kv_heads, head_dim), size = self.heads, self.page_size
        if self.kv_dtype is None:
            return jax.ShapeDtypeStruct((NUM_PAGES, 2, size, kv_heads * head_dim), jnp.dtype(self.dtype))
        pages = jax.ShapeDtypeStruct((NUM_PAGES, 2, size // 2, kv_heads * head_dim), jnp.uint16)
        scales = jax.ShapeDtypeStruct((NUM_PAGES, 2, size, kv_heads), jnp.bfloat16)
        return ScaledPages(pages, scales) if self.kv_dtype == "int8" else pages

    def plan(self) -> dict:
        """The plan table's entry."""
        heads, kv_heads, head_dim = self.heads
        facts = {"decode": self.decode, "head_dim": head_dim, "group": heads // kv_heads, "rows": self.rows}
        return plans.find("paged_attention", "triton", **facts)


CALLS = {
    "h200": [
        Call((32, 8, 64), True), Call(QWEN3_30B_A3B, True), Call((16, 2, 256), True),
        Call((32, 8, 64), False, 8192), Call(LLAMA_3_8B, False, 8192), Call((16, 16, 256), False, 8192),
        Call((32, 8, 64), False, 2048), Call((28, 4, 128), False, 2048), Call((16, 16, 256), False, 2048),
        # Beside the plans: the smallest group, pages of other sizes, a window, and float16.
        Call(LLAMA_7B, True), Call(LLAMA_7B, False, 8192),
        Call(LLAMA_3_8B, False, 512, page_size=8, window=4096), Call(LLAMA_3_8B, True, page_size=32, dtype="float16"),
    ],
    "a100": [
        Call((32, 8, 64), True), Call(SHARD_OF_70B, True), Call((16, 2, 256), True),
        Call((32, 8, 64), False, 2048), Call(LLAMA_7B, False, 8192), Call((16, 16, 256), False, 2048),
    ],
    "l4": [
        Call((32, 8, 64), True), Call(LLAMA_7B, True), Call((16, 2, 256), True),
        Call((32, 8, 64), False, 2048), Call(SHARD_OF_70B, False, 8192), Call((16, 16, 256), False, 2048),
    ],
}  # fmt: skip


def program(device, calls, layers=1, make=lower_for):
    """All calls as one program, each as `layers` layers that follow one another."""

    def struct(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def arguments(call):
        heads, _, head_dim = call.heads
        num_tiles = 0 if call.decode else ceil_div(call.rows, TILE_ROWS) + SEQS
        tiles = *(struct(SEQS) for _ in range(3)), *(struct(num_tiles) for _ in range(2))
        return (
            struct(call.rows, heads, head_dim, dtype=call.dtype),
            [call.pool] * layers,
            AttentionTiles(struct(SEQS, MAX_PAGES), *tiles, struct(), struct(SEQS), struct()),
        )

    def run(arguments):
        outputs = []
        for call, (q, pools, tiles) in zip(calls, arguments, strict=True):
            heads, kv_heads, head_dim = call.heads
            attend = PagedAttention(
                tiles, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=call.page_size,
                dtype=call.dtype, decode=call.decode, tile_rows=TILE_ROWS, window=call.window, kv_dtype=call.kv_dtype,
                implementation="triton",
            )  # fmt: skip
            for pool in pools:
                q = attend(q, pool)
            outputs.append(q)
        return outputs

    return make(TARGETS[device.name], jax.jit(run), [arguments(call) for call in calls])


@pytest.mark.parametrize("name", CALLS)
def test_no_plan_spills(name):
    device, calls = devices.DEVICES[name], CALLS[name]
    uses = kernels_in(program(device, calls), device)
    assert sum(use.count for use in uses) == len(calls)
    resident = []
    for use in uses:
        print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
        assert (use.name, use.backend) == ("paged_attention_kernel", "triton")
        assert use.spill_bytes == 0 and use.registers <= 255 and use.shared_bytes <= device.shared_bytes
        assert "cp.async.cg.shared.global" in use.ptx, "no 16-byte asynchronous copies"
        assert "mma.sync" in use.ptx, "no tensor cores"
        threads = int(re.search(r"\.reqntid (\d+)", use.ptx)[1])
        by_registers = 65536 // (ceil_div(use.registers, 8) * 8 * threads)
        by_shared = TARGETS[name].shared_per_sm // (use.shared_bytes + 1024)
        resident += [min(by_registers, by_shared)] * use.count
    with devices.compiling_for(device):
        planned = [call.plan()["per_sm"] for call in calls]
    assert sorted(planned) == sorted(resident), "the plans' programs per multiprocessor are not those that fit"
    if device.compute_capability == 90:
        with_wgmma = sum(use.count for use in uses if "wgmma.mma_async" in use.ptx)
        assert with_wgmma == sum(not call.decode for call in calls)


@pytest.mark.parametrize("name", ["h200", "a100"])
def test_keys_and_values_of_one_byte_spill_nothing(name):
    """int8 on both devices, fp8 on Hopper."""
    device = devices.DEVICES[name]
    calls = [Call(LLAMA_3_8B, True, kv_dtype="int8"), Call((32, 8, 64), False, 2048, kv_dtype="int8")]
    if name == "h200":
        calls = [replace(calls[0], kv_dtype="fp8"), calls[1], Call(LLAMA_3_8B, False, 8192, kv_dtype="fp8")]
    else:
        with pytest.raises(NotImplementedError, match="fp8 keys and values on a100; int8 is served"):
            program(device, [replace(calls[0], kv_dtype="fp8")])
    uses = kernels_in(program(device, calls), device)
    assert sum(use.count for use in uses) == len(calls)
    for use in uses:
        print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
        assert use.spill_bytes == 0 and use.shared_bytes <= device.shared_bytes
        assert "cp.async.cg.shared.global" in use.ptx and "mma" in use.ptx


@pytest.mark.parametrize("name", CALLS)
def test_every_plan_of_a_device_is_compiled(name):
    with devices.compiling_for(devices.DEVICES[name]):
        planned = [call.plan() for call in CALLS[name]]
    entries = [entry for entry in plans._table("paged_attention") if entry["op"] == "triton"]
    own = [entry for entry in entries if entry["device"] == name]
    for entry in own or [entry for entry in entries if entry["device"] == "any"]:
        assert entry["plan"] in planned, entry


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_layers_share_the_work_and_nothing_is_copied(decode):
    device = devices.DEVICES["h200"]
    call = Call(LLAMA_3_8B, decode, SEQS if decode else 8192)
    compiled = program(device, [call], layers=3, make=compile_for)
    assert [use.count for use in kernels_in(compiled, device)] == [3]
    text = compiled.as_text()
    assert " copy(" not in text and "copy-start" not in text
    entry = text[text.index("ENTRY") :]
    assert entry.count(" fusion(") + entry.count(" sort(") <= 12  # once for all layers
