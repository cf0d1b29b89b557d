"""Custom kernels read from programs compiled for absent GPUs."""

import add_kernel
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from pallas_kernels.triton_call import triton_call
from slora_jax.analysis import kernels_in
from slora_jax.analysis.ptxas import Resources, read_report

X = jax.ShapeDtypeStruct((1024,), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)


def add(x, y, block=128):
    (out,) = triton_call(
        add_kernel.add, x, y, out=[jax.ShapeDtypeStruct(x.shape, x.dtype)], grid=(1024 // block,), num_warps=4,
        num_stages=1, block=block,
    )  # fmt: skip
    return out


def multiply(x, y):
    (out,) = triton_call(add_kernel.multiply, x, y, out=[SQUARE], grid=(1,), num_warps=4, num_stages=1, block=64)
    return out


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_a_kernel_used_twice_is_counted_twice(device) -> None:
    """In the compiled program as in the lowered one."""
    make = compile_for if device.name == "l4" else lower_for
    (use,) = kernels_in(make(TARGETS[device.name], jax.jit(lambda x, y: add(x, add(x, y) * 2)), X, X), device)
    assert (use.name, use.backend, use.count) == ("add", "triton", 2)
    assert 8 <= use.registers <= 32
    assert use.spill_bytes == use.shared_bytes == 0
    assert f".target sm_{device.compute_capability}" in use.ptx
    assert "ld.global" in use.ptx


def test_shared_memory_is_read() -> None:
    compiled = compile_for(TARGETS["h200"], jax.jit(multiply), SQUARE, SQUARE)
    (use,) = kernels_in(compiled, DEVICES["h200"])
    assert use.name == "multiply"
    assert use.shared_bytes == 2 * 64 * 64 * 2  # both operands
    assert "wgmma.mma_async" in use.ptx


def test_a_kernel_in_a_loop_counts_once_per_iteration() -> None:
    def looped(x, y):
        y = jax.lax.fori_loop(0, 3, lambda _, y: add(x, y), y)
        return jax.lax.fori_loop(0, 2, lambda _, y: jax.lax.fori_loop(0, 5, lambda _, y: add(x, y, block=256), y), y)

    uses = kernels_in(compile_for(TARGETS["l4"], jax.jit(looped), X, X), DEVICES["l4"])
    assert sorted((use.name, use.count) for use in uses) == [("add", 3), ("add", 10)]


def test_a_kernel_in_a_branch_counts_as_launched() -> None:
    def branching(x, y):
        return jax.lax.cond(y[0] > 0, lambda: add(x, y), lambda: add(x, y, block=256))

    uses = kernels_in(compile_for(TARGETS["a100"], jax.jit(branching), X, X), DEVICES["a100"])
    assert [use.count for use in uses] == [1, 1]


def test_xla_fusions_are_not_custom_kernels() -> None:
    compiled = compile_for(TARGETS["h200"], jax.jit(lambda x: jax.nn.softmax(x @ x) + 1), SQUARE)
    assert kernels_in(compiled, DEVICES["h200"]) == []


def test_a_mosaic_kernel_is_read_from_the_program() -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def copy_kernel(x_ref, out_ref, smem, barrier):
        plgpu.copy_gmem_to_smem(x_ref, smem, barrier)
        plgpu.barrier_wait(barrier)
        smem[...] = smem[...] * 2
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    double = plgpu.kernel(
        copy_kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()],
        kernel_name="double",
    )
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = compile_for(TARGETS["h200"], jax.jit(lambda x: double(double(x))), x)
    (use,) = kernels_in(compiled, DEVICES["h200"])
    assert (use.name, use.backend, use.count) == ("double", "mosaic_gpu", 2)
    assert 8 <= use.registers <= 128
    assert use.spill_bytes == 0
    assert 64 * 64 * 4 < use.shared_bytes < 64 * 64 * 4 + 256
    assert "cp.async.bulk.tensor" in use.ptx


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 1040 bytes smem
"""


def test_spill_bytes_add_stores_and_loads() -> None:
    assert read_report(REPORT) == Resources(registers=255, spill_bytes=48, shared_bytes=1040)
