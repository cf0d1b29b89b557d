"""Saved training states: a PEFT directory, with the optimizer's state beside the weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import LoraAdapter, LoraConfig, write_peft
from slora_jax.adapters.peft_format import CONFIG_FILE
from slora_jax.errors import AdapterError
from slora_jax.serving.http.errors import ApiError

STATE_FILE = "trainer_state.safetensors"
SCHEME = "tinker://"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")


def check_name(name: str, field: str) -> str:
    """Returns a name that can be part of a path. Raises ApiError for any other."""
    if not _NAME.fullmatch(name):
        message = f"{field}={name!r}: must be 1 to 200 letters, digits and _.:- that begin with a letter, digit or _"
        raise ApiError(400, message, code="invalid_value", param=field)
    return name


@dataclass(frozen=True)
class SavedState:
    """A training state on disk.

    Attributes:
      optimizer: what `Trainer.restore` takes; None: only the weights are to be loaded.
    """

    directory: Path
    lora: LoraConfig
    optimizer: Mapping[str, np.ndarray] | None


class StateDirectory:
    """The directory of all saved states: `MODEL/weights/NAME` for the path `tinker://MODEL/weights/NAME`. Its methods
    use the disk; call them in a thread."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def path(self, model: str, name: str, *, overwrite: bool) -> str:
        """Returns the path of a new state.

        Raises:
          ApiError: states cannot be saved, the name is invalid, or it is in use and may not be overwritten.
        """
        directory = self._weights(model) / check_name(name, "path")
        if directory.exists() and not overwrite:
            message = f"path={name!r} exists; choose another name, or pass overwrite=True"
            raise ApiError(400, message, code="name_taken", param="path")
        return f"{SCHEME}{model}/weights/{name}"

    def save(self, path: str, adapter: LoraAdapter, state: Mapping[str, np.ndarray], base_name: str) -> None:
        """Writes a state. Until it is complete, an older one under the same path stays."""
        directory = self._directory(path)
        directory.parent.mkdir(parents=True, exist_ok=True)
        new = Path(mkdtemp(prefix=".new-", dir=directory.parent))
        try:
            write_peft(new, adapter, base_model_name_or_path=base_name)
            save_file({name: np.asarray(array, order="C") for name, array in state.items()}, new / STATE_FILE)
            shutil.rmtree(directory, ignore_errors=True)
            new.rename(directory)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def load(self, path: str, *, with_optimizer: bool) -> SavedState:
        """Reads a state.

        Raises:
          ApiError: there is no such state.
          AdapterError: its files cannot be read.
        """
        directory = self._directory(path)
        if not directory.is_dir():
            raise ApiError(404, f"path={path!r}: no such state", code="no_such_state", param="path")
        try:
            optimizer = load_file(directory / STATE_FILE) if with_optimizer else None
        except Exception as error:
            raise AdapterError(f"{STATE_FILE} of {path}: cannot be read: {error}") from error
        return SavedState(directory, LoraConfig.from_file(directory / CONFIG_FILE), optimizer)

    def _directory(self, path: str) -> Path:
        model, kind, name = [*path.removeprefix(SCHEME).split("/"), "", ""][:3]
        if not path.startswith(SCHEME) or path.count("/") != 4 or kind != "weights":
            message = f"path={path!r}: must be {SCHEME}MODEL/weights/NAME, as save_state returns"
            raise ApiError(400, message, code="invalid_value", param="path")
        return self._weights(check_name(model, "path")) / check_name(name, "path")

    def _weights(self, model: str) -> Path:
        if self._root is None:
            message = "this server does not save training states: start slora serve with --train-dir DIR"
            raise ApiError(400, message, code="not_supported", param="path")
        return self._root / model / "weights"
