"""Loads a checkpoint as a decoder ready to run."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from slora_jax.models.cache import checkpoint_key, entry_path, read_entry, write_entry
from slora_jax.models.config import ModelConfig
from slora_jax.models.decoder import Params, model_dtype
from slora_jax.models.hf import load_weights, untied_if_heads_differ, warn_of_rounding
from slora_jax.models.init import abstract_decoder, abstract_shards
from slora_jax.parallel.mesh import TensorParallel


def load_model(
    model_dir: str | Path,
    dtype: Any,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    parallel: TensorParallel | None = None,
    config: ModelConfig | None = None,
) -> tuple[nnx.GraphDef, Params, ModelConfig]:
    """Loads a Hugging Face directory (safetensors) or a GGUF file.

    Args:
      dtype: "float32" or "bfloat16", independent of the checkpoint's dtype.
      cache_dir: where converted weights are cached until the checkpoint changes; None: no cache.
      progress: shows bytes read, on stderr.
      parallel: shards the parameters over its devices.
      config: the checkpoint's config, if already read. Its `weights` is the format in which kernels are stored.

    Returns:
      The graph definition (of a shard, with `parallel`), the parameters, and the config of the whole model.

    Raises:
      CheckpointError: a file is missing or damaged.
      UnsupportedModelError: the model is not supported.
    """
    dtype = model_dtype(dtype)
    if config is None:
        config = ModelConfig.from_directory(model_dir)
    config = untied_if_heads_differ(model_dir, config, dtype)
    warn_of_rounding(model_dir, config, dtype)
    if parallel is None:
        graphdef, shapes = abstract_decoder(config, dtype)
    else:
        graphdef, shapes = abstract_shards(config, dtype, parallel)
    if cache_dir is None or jax.process_count() > 1:  # no process has the whole arrays to cache
        return graphdef, load_weights(model_dir, config, dtype, progress, parallel), config
    entry = entry_path(cache_dir, model_dir, dtype, 1 if parallel is None else parallel.shards.count, config.weights)
    key = checkpoint_key(model_dir, config, dtype)
    params = read_entry(entry, key, shapes)
    if params is None:
        params = load_weights(model_dir, config, dtype, progress, parallel)
        write_entry(entry, key, params)
    return graphdef, params, config
