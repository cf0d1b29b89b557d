"""Checkpoints of training: exact arrays, and refusal of those of another recipe."""

import numpy as np
import pytest

from slora_jax.errors import ConfigError
from slora_jax.training.checkpoint import Checkpoints

ARRAYS = {
    ("state", "a.b", "step"): np.array(3),
    ("state", "a", "b.step"): np.array([1 << 40, -1]),
    ("best", "a"): np.array([[0.1, np.nan, -0.0]], np.float32),
}
CONDITIONS = {"max_length": 8, "adapters": {"a": {"seed": 0}, "b": {"seed": 0}}}


def test_the_newest_checkpoint_is_restored_bit_by_bit(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", CONDITIONS)
    assert checkpoints.restore() is None
    checkpoints.save(1, {"loss": 0.1}, {("x",): np.zeros(3)})
    checkpoints.save(5, {"loss": 0.1 + 0.2}, ARRAYS)
    checkpoints.save(5, {"loss": 9}, {("x",): np.zeros(3)})  # this step is there already
    (tmp_path / "c" / "7.orbax-checkpoint-tmp").mkdir()  # left by a killed process
    data, arrays = Checkpoints(tmp_path / "c", CONDITIONS).restore()
    assert data == {"loss": 0.1 + 0.2} and list(arrays) == list(ARRAYS)
    for key, array in ARRAYS.items():
        assert arrays[key].dtype == array.dtype and arrays[key].shape == array.shape
        assert arrays[key].tobytes() == array.tobytes()
    assert not (tmp_path / "c" / "1").exists()


def test_a_checkpoint_of_another_recipe_is_refused_by_field(tmp_path) -> None:
    Checkpoints(tmp_path, CONDITIONS).save(5, {}, ARRAYS)
    for adapters, message in (
        ({"a": {"seed": 1}, "b": {"seed": 0}}, "adapters.a.seed was 0, is 1 now"),
        ({"a": {"seed": 0}}, "adapters.b is missing now"),
        (CONDITIONS["adapters"] | {"c": {}}, "adapters.c is new"),
    ):
        with pytest.raises(ConfigError, match=f"the checkpoint of step 5 was made with another recipe: {message}"):
            Checkpoints(tmp_path, {"max_length": 8, "adapters": adapters}).check()
    same = Checkpoints(tmp_path, CONDITIONS)
    same.check()
    same.clear()
    Checkpoints(tmp_path, {}).check()
