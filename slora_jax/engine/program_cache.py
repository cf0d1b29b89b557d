"""A cache of compiled programs on disk, which avoids tracing, lowering and compiling.

JAX's own compilation cache avoids only XLA's work; tracing and lowering every program still takes seconds. An entry
here is a serialized executable, keyed by a digest of everything it depends on: this project's source, JAX and its
settings, the processor, and the shapes and structure of the engine's step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from flax import traverse_util
from jax.experimental import serialize_executable

import pallas_kernels
from slora_jax.engine.step_spec import StepSpec
from slora_jax.models.hf import load_device

KEPT_SECONDS = 30 * 24 * 3600
"""Entries not used for this long are deleted when a new one is written."""

_IRRELEVANT_SETTINGS = re.compile(r"jax_(compilation_cache|persistent_cache|log|debug|traceback|dump).*")
_OPTION_WITHOUT_EFFECT = "xla_gpu_kernel_cache_file"
"""A compiler option that accepts any text and is ignored on a CPU."""

logger = logging.getLogger("slora_jax")


class ProgramCache:
    """The cached programs of one engine, by name. Several processes may share the directory.

    Entries are pickles, which can execute code, so only the owner may have write access to the directory.
    """

    def __init__(self, directory: Path, spec: StepSpec) -> None:
        self._directory = directory
        self._engine = f"{_environment()} {_spec_key(spec)}"

    def compile(self, name: str, about: str, lowered: Any) -> Any:
        """Compiles a program that `load` did not find, and writes its entry.

        XLA cannot serialize an executable that was read from JAX's cache, because its functions are missing. A unique
        value of a compiler option makes the compilation miss that cache.
        """
        compiled = lowered.compile({_OPTION_WITHOUT_EFFECT: uuid.uuid4().hex})
        self._store(self._path(name, about), compiled)
        return compiled

    def load(self, name: str, about: str) -> Any | None:
        """Returns the compiled program, or None if there is no usable entry. `about` describes what the program depends
        on besides the engine, such as its bucket."""
        path = self._path(name, about)
        try:
            payload, arguments, results = pickle.loads(path.read_bytes())
            compiled = serialize_executable.deserialize_and_load(
                payload, arguments, results, execution_devices=[load_device()]
            )
            os.utime(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  a damaged entry is compiled again
            logger.warning("%s: this compiled program cannot be used and is compiled again: %r", path, error)
            return None
        return compiled

    def _store(self, path: Path, compiled: Any) -> None:
        """Writes an entry. Errors are logged, not raised."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                file.write(pickle.dumps(serialize_executable.serialize(compiled)))
            os.replace(file.name, path)
            self._delete_unused()
        except Exception as error:  # noqa: BLE001  for example a full disk
            logger.warning("%s: the compiled program could not be written: %r", path, error)

    def _path(self, name: str, about: str) -> Path:
        digest = hashlib.sha256(f"{self._engine} {name} {about}".encode()).hexdigest()
        return self._directory / f"{name}-{digest[:32]}"

    def _delete_unused(self) -> None:
        oldest = time.time() - KEPT_SECONDS
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another process has renamed or deleted it
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _spec_key(spec: StepSpec) -> str:
    params = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in traverse_util.flatten_dict(spec.params).items()}
    numbers = (spec.max_num_seqs, spec.max_pages_per_seq, spec.max_rank, spec.kernels, spec.lora)
    return repr((spec.model, spec.pool, sorted(params.items(), key=str), numbers))


@cache
def _environment() -> str:
    """Returns a digest of the source, versions, settings and processor that compiled programs depend on."""
    digest = hashlib.sha256()
    for file in _source():
        digest.update(file.read_bytes())
    settings = {name: value for name, value in jax.config.values.items() if not _IRRELEVANT_SETTINGS.match(name)}
    about = [sys.version, jax.__version__, jaxlib.__version__, platform.machine(), _processor(), load_device().id]
    about += [os.environ.get("XLA_FLAGS"), sorted(settings.items())]
    digest.update(json.dumps(about, default=repr).encode())
    return digest.hexdigest()


def _source() -> Iterator[Path]:
    for root in (Path(__file__).parents[1], Path(pallas_kernels.__path__[0])):
        yield from sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json"))


def _processor() -> str:
    """Returns the processor's features, because code compiled for missing ones would crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
