"""The Triton attention kernel at real sizes, compiled for GPUs that are not there: what the machine code says."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from gpu_shapes import LAYERS
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import devices
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention
from pallas_kernels.targets import TARGETS, deviceless_mesh
from slora_jax.analysis import kernels_in

SEQS, MAX_PAGES, NUM_PAGES, TILE_ROWS = 64, 2048, 4000, 64

REAL = sorted({(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in LAYERS})
LLAMA_3_8B = (32, 8, 128)


@dataclass(frozen=True)
class Call:
    """One layer's attention in a step of `rows` rows; without prefill if `decode`."""

    heads: tuple[int, int, int]
    decode: bool
    rows: int = SEQS
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None


def compiled(device, calls, layers=1):
    """All calls as one program, each as `layers` layers that follow one another."""
    here = NamedSharding(deviceless_mesh(TARGETS[device.name]), PartitionSpec())

    def struct(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here)

    def arguments(call):
        heads, kv_heads, head_dim = call.heads
        num_tiles = 0 if call.decode else ceil_div(call.rows, TILE_ROWS) + SEQS
        tiles = *(struct(SEQS) for _ in range(3)), *(struct(num_tiles) for _ in range(2))
        return (
            struct(call.rows, heads, head_dim, dtype=call.dtype),
            [struct(NUM_PAGES, 2, call.page_size, kv_heads * head_dim, dtype=call.dtype)] * layers,
            AttentionTiles(struct(SEQS, MAX_PAGES), *tiles, struct(), struct(SEQS), struct()),
        )

    def run(arguments):
        outputs = []
        for call, (q, pools, tiles) in zip(calls, arguments, strict=True):
            heads, kv_heads, head_dim = call.heads
            attend = PagedAttention(
                tiles, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=call.page_size,
                dtype=call.dtype, decode=call.decode, tile_rows=TILE_ROWS, window=call.window, implementation="triton",
            )  # fmt: skip
            for pool in pools:
                q = attend(q, pool)
            outputs.append(q)
        return outputs

    with devices.compiling_for(device):
        traced = jax.jit(run).trace([arguments(call) for call in calls])
        return traced.lower(lowering_platforms=("cuda",)).compile()


def check(device, calls):
    uses = kernels_in(compiled(device, calls), device)
    assert sum(use.count for use in uses) == len(calls)
    for use in uses:
        print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
        assert (use.name, use.backend) == ("paged_attention_kernel", "triton")
        assert use.spill_bytes == 0 and use.registers <= 255 and use.shared_bytes <= device.shared_bytes
        assert "cp.async.cg.shared.global" in use.ptx, "no 16-byte asynchronous copies"
        assert "mma.sync" in use.ptx, "no tensor cores"
    if device.compute_capability == 90:
        with_wgmma = sum(use.count for use in uses if "wgmma.mma_async" in use.ptx)
        assert with_wgmma == sum(not call.decode for call in calls)


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda d: d.name)
def test_no_kernel_spills_at_real_sizes(device):
    check(device, [Call(heads, True) for heads in REAL] + [Call(heads, False, 8192) for heads in REAL])


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda d: d.name)
def test_no_other_heads_spill(device):
    others = Call((32, 8, 64), False, 2048), Call((16, 16, 256), False, 2048), Call((28, 4, 128), False, 2048)
    check(device, [*others, Call((32, 8, 64), True), Call((16, 2, 256), True)])


def test_no_smaller_steps_and_other_pages_windows_and_types_spill():
    small = Call(LLAMA_3_8B, False, 512), Call(LLAMA_3_8B, False, 512, page_size=8, window=4096)
    check(devices.DEVICES["h200"], [*small, Call(LLAMA_3_8B, True, page_size=32, dtype="float16")])


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_layers_share_the_work_and_nothing_is_copied(decode):
    device = devices.DEVICES["h200"]
    program = compiled(device, [Call(LLAMA_3_8B, decode, SEQS if decode else 2048)], layers=3)
    assert [use.count for use in kernels_in(program, device)] == [3]
    text = program.as_text()
    assert " copy(" not in text and "copy-start" not in text
    entry = text[text.index("ENTRY") :]
    assert entry.count(" fusion(") + entry.count(" sort(") <= 12  # once for all layers
