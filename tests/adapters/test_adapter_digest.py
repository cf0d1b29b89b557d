"""The digest depends on the content that determines the computation, and on nothing else."""

import dataclasses

import numpy as np
import pytest

from slora_jax.adapters import random_adapter, read_peft, write_peft


@pytest.fixture
def adapter(geometry):
    return random_adapter(geometry, 4, targets=["q", "down"], seed=5)


def changed(adapter, **fields):
    return dataclasses.replace(adapter, **fields).digest


def test_equal_content_in_different_directories_has_one_digest(adapter, geometry, tmp_path):
    for name in ("one", "two"):
        write_peft(tmp_path / name, adapter, base_model_name_or_path=name)
    assert (
        read_peft(tmp_path / "one", geometry).digest == read_peft(tmp_path / "two", geometry).digest == adapter.digest
    )


def test_one_bit_of_one_weight_changes_the_digest(adapter):
    for side in ("a", "b"):
        matrices = dict(getattr(adapter, side))
        matrices[2, "down"] = matrices[2, "down"].copy()
        matrices[2, "down"].view(np.uint32)[1, 1] ^= 1
        assert changed(adapter, **{side: matrices}) != adapter.digest


def test_scale_changes_the_digest(adapter):
    assert changed(adapter, scales=dict(adapter.scales) | {(0, "q"): 1.0000001}) != adapter.digest


def test_the_adapted_projection_changes_the_digest(geometry):
    """gate and up have equal shapes: the same weights on the other projection are another adapter."""
    gate, up = (random_adapter(geometry, 4, targets=[projection], seed=1) for projection in ("gate", "up"))
    np.testing.assert_array_equal(gate.a[0, "gate"], up.a[0, "up"])
    assert gate.digest != up.digest


def test_memory_order_and_description_do_not_change_the_digest(adapter):
    reordered = {key: np.asfortranarray(matrix) for key, matrix in reversed(adapter.a.items())}
    assert changed(adapter, a=reordered) == adapter.digest
    assert changed(adapter, config=dataclasses.replace(adapter.config, r=4, lora_alpha=9)) == adapter.digest


def test_storage_precision_matters_only_through_the_values(adapter, geometry, tmp_path):
    half = read_peft(write_peft(tmp_path / "half", adapter, dtype="float16"), geometry)
    single = read_peft(write_peft(tmp_path / "single", half, dtype="float32"), geometry)
    assert half.digest == single.digest != adapter.digest
