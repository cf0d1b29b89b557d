"""Checkpoints of a training run, in Orbax's format. A partial one, left by a killed process, is never read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slora_jax.errors import ConfigError

if TYPE_CHECKING:  # the import takes seconds
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

Key = tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run; only the newest is kept.

    A checkpoint contains JSON, arrays, and the conditions (recipe, model, data) that its weights depend on.
    """

    def __init__(self, directory: Path, conditions: Mapping[str, Any]) -> None:
        """Opens the directory, which may not exist.

        Args:
          conditions: those of this run, as JSON.
        """
        import orbax.checkpoint as ocp

        self._directory = directory
        self._conditions = conditions
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager: ocp.CheckpointManager = ocp.CheckpointManager(
            directory.resolve(), options=options, item_names=("json", "arrays")
        )

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()

    def check(self) -> None:
        """Raises ConfigError, naming the field, if the newest checkpoint was made under other conditions."""
        if (step := self._manager.latest_step()) is None:
            return
        difference = first_difference(self._read_json(step)["conditions"], self._conditions)
        if difference is not None:
            raise ConfigError(
                f"{self._directory}: the checkpoint of step {step} was made with another recipe: {difference}; restore "
                "that, name another output, or start anew with --restart"
            )

    def save(self, step: int, data: Mapping[str, Any], arrays: Mapping[Key, np.ndarray]) -> None:
        """Writes a checkpoint, then removes the former one. Does nothing if the newest one is of this step.

        Args:
          step: position of the run.
          data: further JSON.
          arrays: non-empty arrays of any shape and dtype.
        """
        import orbax.checkpoint as ocp

        if self._manager.latest_step() == step:
            return
        keys = list(arrays)
        content = {"conditions": self._conditions, "data": data, "keys": keys}
        numbered = {str(number): np.asarray(arrays[key]) for number, key in enumerate(keys)}
        numbered = numbered or {"none": np.zeros(1)}  # Orbax rejects an empty tree
        self._manager.save(
            step, args=ocp.args.Composite(json=ocp.args.JsonSave(content), arrays=ocp.args.PyTreeSave(numbered))
        )

    def restore(self) -> tuple[dict[str, Any], dict[Key, np.ndarray]] | None:
        """Returns JSON and arrays of the newest checkpoint, or None if there is none."""
        import orbax.checkpoint as ocp

        if (step := self._manager.latest_step()) is None:
            return None
        content = self._read_json(step)
        numbered = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore())).arrays
        return content["data"], {tuple(key): numbered[str(number)] for number, key in enumerate(content["keys"])}

    def clear(self) -> None:
        """Removes every checkpoint."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def _read_json(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        content: dict[str, Any] = self._manager.restore(step, args=ocp.args.Composite(json=ocp.args.JsonRestore())).json
        return content


def first_difference(saved: Any, given: Any, where: str = "") -> str | None:
    """Describes the first difference between two JSON values by its dotted field; None if they are equal."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for key in (*saved, *(key for key in given if key not in saved)):
            name = f"{where}.{key}" if where else key
            if key not in given:
                return f"{name} is missing now"
            if key not in saved:
                return f"{name} is new"
            if difference := first_difference(saved[key], given[key], name):
                return difference
        return None
    return None if saved == given else f"{where} was {saved!r}, is {given!r} now"


def replace_directory(directory: Path, scratch: Path) -> None:
    """Moves `scratch / "new"` to `directory`, whose former content is removed together with `scratch`.

    Args:
      scratch: a directory on the same file system, for this purpose alone.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        directory.rename(scratch / "old")
    (scratch / "new").rename(directory)
    shutil.rmtree(scratch)
