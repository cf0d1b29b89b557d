"""Orbax cache of converted weights, so that a checkpoint is converted once.

Each (model directory, dtype, format of quantised weights, shards) has an entry
`<cache_dir>/<model>-<dtype>[-<format>][-tp<N>]-<path digest>/`: the Orbax tree
in `params/`, and `manifest.json` with the key of the source checkpoint and the CRC-32 of every file. An entry is
written to a temporary directory and renamed into place, so partial writes are never read. If the checkpoint changes,
its entry is replaced.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import traverse_util

from slora_jax.models.config import ModelConfig
from slora_jax.models.decoder import Params
from slora_jax.models.hf import checkpoint_files, load_device
from slora_jax.models.placements import ParamPath
from slora_jax.models.traits import WeightFormat

if TYPE_CHECKING:  # the import takes seconds, and only this cache needs it
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

CONVERTER_VERSION = 2
"""Incremented whenever the converted form changes; entries of other versions are stale."""

_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16
_LOG = logging.getLogger(__name__)


def checkpoint_key(model_dir: str | Path, config: ModelConfig, dtype: np.dtype) -> str:
    """Digest of everything that the converted weights depend on.

    It covers each weight file's name, size, modification time and samples spread over its content, since fine-tunes of
    one model have equal headers and unpacked archives can have equal times.
    """
    digest = hashlib.sha256(json.dumps([CONVERTER_VERSION, dataclasses.asdict(config), dtype.name]).encode())
    for file in checkpoint_files(model_dir):
        stat = file.stat()
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
        with open(file, "rb") as content:
            for sample in range(_SAMPLES_PER_FILE):
                content.seek(max(0, stat.st_size - _SAMPLE_BYTES) * sample // (_SAMPLES_PER_FILE - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def entry_path(
    cache_dir: str | Path,
    model_dir: str | Path,
    dtype: np.dtype,
    shards: int = 1,
    weights: WeightFormat | None = None,
) -> Path:
    """The directory of the entry for a model directory, dtype, number of shards and format of quantised weights,
    whether or not it exists."""
    resolved = Path(model_dir).resolve()
    path_digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    kind = "-".join([dtype.name, *([weights] if weights else []), *([f"tp{shards}"] if shards > 1 else [])])
    return Path(cache_dir).resolve() / f"{resolved.name}-{kind}-{path_digest}"


def read_entry(entry: Path, key: str, shapes: Params) -> Params | None:
    """Returns the cached parameters, or None if the entry is absent, stale or damaged; the last two log a warning.

    Args:
      shapes: the parameters' abstract tree, with or without shardings.
    """
    if not entry.exists():
        return None
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        if manifest["key"] != key:
            _LOG.warning("%s: the cached weights are of another state of the checkpoint; converting again", entry)
            return None
        if _checksums(entry / "params") != manifest["crc32"]:
            raise ValueError("files differ from the manifest")
        return _restore(entry / "params", shapes)
    except Exception as error:  # noqa: BLE001  # Orbax and TensorStore raise many types for damaged files
        _LOG.warning("%s: the cached weights cannot be used; converting again: %s", entry, error)
        return None


def write_entry(entry: Path, key: str, params: Params) -> None:
    """Replaces the entry atomically. A failure, e.g. a full disk, is only logged as a warning."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name}-", dir=entry.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _save(new / "params", params)
            manifest = {"key": key, "crc32": _checksums(new / "params")}
            (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if entry.exists():
                entry.rename(Path(scratch) / "old")
            new.rename(entry)
    except Exception as error:  # noqa: BLE001  # without a cache the model still loads
        _LOG.warning("%s: the converted weights could not be cached: %s", entry, error)


def _names(params: Params) -> dict[str, ParamPath]:
    return {".".join(map(str, path)): path for path in traverse_util.flatten_dict(params)}


def _save(path: Path, params: Params) -> None:
    import orbax.checkpoint as ocp

    flat = traverse_util.flatten_dict(params)
    tree = {name: flat[param_path] for name, param_path in _names(params).items()}
    with _checkpointer(tree) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _restore(path: Path, shapes: Params) -> Params:
    import orbax.checkpoint as ocp

    flat = traverse_util.flatten_dict(shapes)
    here = jax.sharding.SingleDeviceSharding(load_device())
    tree = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in ((name, flat[param_path]) for name, param_path in _names(shapes).items())
    }
    with _checkpointer(tree) as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        arrays = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
    if differing := [n for n in tree if (arrays[n].shape, arrays[n].dtype) != (tree[n].shape, tree[n].dtype)]:
        raise ValueError(f"parameters of another shape or dtype: {', '.join(differing)}")
    return traverse_util.unflatten_dict({path: arrays[name] for name, path in _names(shapes).items()})


def _checkpointer(tree: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> "ocp.Checkpointer":
    """An Orbax checkpointer whose buffers in flight stay below 1/20 of the weights, or the largest one if larger.

    Compression is off: weights hardly compress, and decompression buffers would raise peak memory.
    """
    import orbax.checkpoint as ocp

    sizes = [int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in tree.values()]
    in_flight_gb = max(sum(sizes) / 20, max(sizes) + 1) / 1e9
    process = jax.process_index()  # every process keeps its own copy, independently
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=in_flight_gb,  # accepts fractions
        restore_concurrent_gb=in_flight_gb,
        multiprocessing_options=alone,
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of every file below the directory, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {str(path.relative_to(directory)): crc for path, crc in zip(files, pool.map(_crc32, files), strict=True)}


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
