"""A decoder as (graph definition, parameters): abstract for compilation, or random for benchmarks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from slora_jax.models.config import ModelConfig
from slora_jax.models.decoder import Decoder, DecoderLayer, Params, model_dtype
from slora_jax.models.quantised import quantise_kernel, scale_path
from slora_jax.models.traits import LayerKind
from slora_jax.parallel.mesh import TensorParallel, parameter_spec


def abstract_decoder(config: ModelConfig, dtype: Any) -> tuple[nnx.GraphDef, Params]:
    """The graph definition, and the parameter tree as `jax.ShapeDtypeStruct`s without allocation.

    Parameters are a plain nested dictionary, e.g. `params["layers"][0]["qkv"]["kernel"]`; `nnx.merge(graphdef, params)`
    returns the `Decoder`, also inside a jitted function.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype)))
    return graphdef, nnx.to_pure_dict(state)


def layer_graph(config: ModelConfig, kind: LayerKind, dtype: Any) -> nnx.GraphDef:
    """The graph definition of a decoder layer; its parameters are `params["layers"][i]` for any layer i of this kind.
    The layer's number is 0."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, kind, 0, model_dtype(dtype))))[0]


def abstract_shards(config: ModelConfig, dtype: Any, parallel: TensorParallel) -> tuple[nnx.GraphDef, Params]:
    """The graph definition of a shard's decoder, and the abstract whole parameters with their shardings."""
    graphdef, shard = abstract_decoder(parallel.shards.of_model(config), dtype)
    leaves = traverse_util.flatten_dict(shard)
    whole = {path: parallel.struct(leaf, parameter_spec(path)) for path, leaf in leaves.items()}
    return graphdef, traverse_util.unflatten_dict(whole)


def init_random(config: ModelConfig, dtype: Any, seed: int) -> tuple[nnx.GraphDef, Params]:
    """Draws weights and biases from N(0, 0.02²) on the default device, one key per leaf; norm scales are 1."""
    graphdef, shapes = abstract_decoder(config, dtype)
    key = jax.random.key(seed)
    leaves = {}
    flat = traverse_util.flatten_dict(shapes)
    for index, (path, leaf) in enumerate(sorted(flat.items(), key=str)):
        if path in leaves:
            continue  # the scale of a quantised kernel
        if path[-1] == "scale":
            leaves[path] = jnp.ones(leaf.shape, leaf.dtype)
        elif (scale := scale_path(path)) in flat:
            weights = config.weights
            assert weights is not None
            drawn = _normal(jax.random.fold_in(key, index), leaf.shape, jnp.dtype(jnp.float32))
            own = quantise_kernel(np.asarray(drawn), weights)
            leaves |= {path: jnp.asarray(own["kernel"]), scale: jnp.asarray(own["scale"])}
        else:
            leaves[path] = _normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
    return graphdef, traverse_util.unflatten_dict(leaves)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
