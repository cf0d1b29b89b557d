"""Packages with lazy exports behave as if everything were imported at once."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = [
    "slora_jax",
    "slora_jax.demo",
    "slora_jax.engine",
    "slora_jax.memory",
    "slora_jax.models",
    "slora_jax.scheduling",
    "pallas_kernels.lora",
    "pallas_kernels.paged_attention",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_export_is_there_and_listed(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for export in package.__all__:
        assert getattr(package, export).__class__.__name__ != "module"
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'Missing'"):
        package.Missing  # noqa: B018


def test_packages_and_settings_import_neither_numpy_nor_jax():
    modules = [*PACKAGES, "slora_jax.engine.config", "slora_jax.models.config", "slora_jax.scheduling.sampling_params"]
    program = f"import sys, {', '.join(modules)}; print([*sys.modules.keys() & {{'jax', 'numpy'}}])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout == "[]\n"
