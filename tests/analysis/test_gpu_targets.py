"""Programs compiled for absent GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.devices import DEVICES
from pallas_kernels.targets import TARGETS, compile_for, deviceless_mesh


def test_every_known_device_is_a_target() -> None:
    assert TARGETS.keys() == DEVICES.keys()
    assert all(target.device is DEVICES[name] for name, target in TARGETS.items())


@pytest.mark.parametrize("name", TARGETS)
def test_a_program_compiles_for_an_absent_gpu(name: str) -> None:
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    compiled = compile_for(TARGETS[name], jax.jit(lambda x: x @ x + 1, donate_argnums=0), x)
    assert "__cublas" in compiled.as_text() or "__triton" in compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes == 64 * 64 * 2
    device = deviceless_mesh(TARGETS[name]).devices.flat[0]
    assert device.platform == "gpu"
    assert device.device_kind.split()[1].startswith(DEVICES[name].kind)


def test_devices_form_one_axis() -> None:
    mesh = deviceless_mesh(TARGETS["h200"], devices=4)
    assert mesh.shape == {"tp": 4}
    assert NamedSharding(mesh, PartitionSpec("tp")).shard_shape((8, 3)) == (2, 3)


def test_compiling_restores_the_compilation_cache(tmp_path, recwarn) -> None:
    before = jax.config.jax_enable_compilation_cache
    for _ in range(2):  # a program read back from the cache would be a warning and a second compilation
        compile_for(TARGETS["h200"], jax.jit(lambda x: x + 1), jax.ShapeDtypeStruct((8,), jnp.float32))
    assert jax.config.jax_enable_compilation_cache == before
    assert not recwarn.list
