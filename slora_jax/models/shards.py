"""Shards parameters that are already in memory."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx, traverse_util

from slora_jax.errors import ConfigError
from slora_jax.models.config import ModelConfig
from slora_jax.models.decoder import Params
from slora_jax.models.init import abstract_shards
from slora_jax.models.placements import ParamPath, Placement, tensor_placements
from slora_jax.parallel.mesh import TensorParallel


def shard_params(config: ModelConfig, params: Params, parallel: TensorParallel) -> tuple[nnx.GraphDef, Params]:
    """Returns the graph definition of a shard's decoder, and `params` sharded over the devices of `parallel`.

    Parameters that `load_model` has sharded are returned unchanged; others are cut on the host, one at a time.

    Raises:
      ConfigError: the parameters are quantised, and not yet sharded.
    """
    leaf = jax.tree.leaves(params)[0]
    dtype = params["embed"]["embedding"].dtype
    graphdef, shapes = abstract_shards(config, dtype, parallel)
    if isinstance(leaf.sharding, jax.sharding.NamedSharding) and leaf.sharding.mesh == parallel.mesh:
        return graphdef, params
    if config.weights is not None:
        raise ConfigError(
            f"weights={config.weights!r}: quantised parameters in memory cannot be sharded over "
            f"tensor_parallel_size={parallel.shards.count} devices; load them with Engine.from_pretrained"
        )
    whole = traverse_util.flatten_dict(params)
    placements = tensor_placements(config)
    own = [tensor_placements(config, parallel.shards, shard) for shard in range(parallel.shards.count)]
    names: dict[ParamPath, list[str]] = {}
    for name, placement in placements.items():
        names.setdefault(placement.path, []).append(name)

    def place(path: ParamPath, struct: jax.ShapeDtypeStruct) -> jax.Array:
        assert struct.sharding is not None
        source, shape = np.asarray(whole[path]), struct.sharding.shard_shape(struct.shape)
        shards = []
        for parts, device in zip(own, parallel.devices, strict=True):
            if device.process_index == jax.process_index():
                shard = np.zeros(shape, source.dtype)
                for name in names[path]:
                    _copy_part(source, shard, placements[name], parts[name])
                shards.append(jax.device_put(shard, device))
        return jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, shards)

    placed = {path: place(path, struct) for path, struct in traverse_util.flatten_dict(shapes).items()}
    return graphdef, traverse_util.unflatten_dict(placed)


def _copy_part(whole: np.ndarray, shard: np.ndarray, of_whole: Placement, of_shard: Placement) -> None:
    """Copies a shard's part of a checkpoint tensor from the whole parameter to the shard's parameter."""
    source, target, first = of_whole.target(whole), of_shard.target(shard), 0
    for rows in of_shard.rows:
        count = rows.stop - rows.start
        target[first : first + count] = source[(rows, *of_shard.columns)]
        first += count
