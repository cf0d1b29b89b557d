"""Sizes that follow from a model and the settings: the longest sequence, the pool, the step programs' spec."""

from __future__ import annotations

import logging
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import BaseGeometry
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.step import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, Params
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.parallel.mesh import TensorParallel, cut

logger = logging.getLogger("slora_jax")


def adapter_geometry(model: ModelConfig, page_size: int, shards: Shards = ONE_DEVICE) -> BaseGeometry:
    """The widths of a base model that adapters depend on, and how it is cut."""
    return BaseGeometry(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        q_width=model.q_width,
        kv_width=model.kv_width,
        intermediate_size=model.intermediate_size,
        page_size=page_size,
        shards=shards,
    )


def longest_sequence(model: ModelConfig, config: EngineConfig) -> int:
    """Most tokens of prompt and output together.

    Raises:
      ConfigError: `max_model_len` is beyond the model's positions.
    """
    if (config.max_model_len or 0) > model.max_position_embeddings:
        positions = model.max_position_embeddings
        raise ConfigError(
            f"EngineConfig.max_model_len={config.max_model_len}: the model has {positions} positions; lower it"
        )
    return config.max_model_len or model.max_position_embeddings


def step_spec(
    model: ModelConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    config: EngineConfig,
    shape: PoolShape,
    parallel: TensorParallel | None = None,
) -> StepSpec:
    """Returns the spec of an engine's step programs. params: `jax.ShapeDtypeStruct` leaves; with `parallel`, graphdef
    and params are those of `models.init.abstract_shards`."""
    return StepSpec(
        model=model,
        graphdef=graphdef,
        params=params,
        pool=shape,
        max_num_seqs=config.max_num_seqs,
        max_pages_per_seq=ceil_div(longest_sequence(model, config), config.page_size),
        max_rank=config.max_lora_rank,
        kernels=None if config.kernels == "auto" else config.kernels,  # type: ignore[arg-type]
        parallel=parallel,
        lora=config.lora,
    )


def pool_shape(model: ModelConfig, config: EngineConfig) -> PoolShape:
    """The pool of an engine, over all its devices; `num_pages=None` is decided by `pages_that_fit`.

    Raises:
      ConfigError: free memory holds no pool, or the model cannot be cut into `config.tensor_parallel_size` shards.
    """
    num_pages = config.num_pages or pages_that_fit(model, config)
    geometry = adapter_geometry(model, config.page_size, cut(model, config.tensor_parallel_size, config.tp_lora))
    if config.adapter_pages is not None and config.adapter_pages > num_pages - 2:
        raise ConfigError(
            f"EngineConfig.adapter_pages={config.adapter_pages}: of a pool of {num_pages} pages, one is the dummy page "
            "and one at least must be left for keys and values; lower it, raise num_pages, or use None"
        )
    largest = int(geometry.layout.num_pages(np.full(7, config.max_lora_rank)))
    return PoolShape(
        num_layers=model.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        width=geometry.pool_width,
        dtype=config.dtype,
        adapter_slots=config.slots(num_pages),
        max_adapter_pages=min(largest, num_pages - 1),
    )


def pages_that_fit(model: ModelConfig, config: EngineConfig) -> int:
    """Pages of a pool in a device's free memory, once its part of the model is there; logged.

    Raises:
      ConfigError: free memory holds no pool, or the model cannot be cut into `config.tensor_parallel_size` shards.
    """
    shards = cut(model, config.tensor_parallel_size, config.tp_lora)
    width = adapter_geometry(model, config.page_size, shards).layout.width  # of a device's pages
    page_bytes = model.num_layers * 2 * config.page_size * width * jnp.dtype(config.dtype).itemsize
    free, where = _free_memory(shards.of_model(model), config)
    num_pages = coarse(free // page_bytes)
    size = f"{page_bytes / 2**20:.2f} MiB each over all layers, {num_pages * page_bytes / 2**30:.2f} GiB of {where}"
    message = f"pool: {num_pages} pages of {config.page_size} tokens ({size})"
    logger.info(message)
    if config.progress:
        tqdm.write(message, file=sys.stderr)
    if num_pages < 2:
        raise ConfigError(
            f"EngineConfig.num_pages=None: {free} bytes of {where} hold no pool; page = {page_bytes} bytes"
        )
    return num_pages


def coarse(num_pages: int) -> int:
    """`num_pages` rounded down to five binary digits, at most 6% less. The pool's size is part of every compiled
    program, and free memory differs a little at each start: the programs of one start must serve the next."""
    unit = 1 << max(0, num_pages.bit_length() - 5)
    return num_pages // unit * unit


def _free_memory(model: ModelConfig, config: EngineConfig) -> tuple[int, str]:
    """Bytes that the pool may take of each of the engine's devices, which run `model`, and where they are."""
    size = config.tensor_parallel_size
    group = jax.devices()[config.tp_first_device :][:size] if size > 1 else jax.local_devices()[:1]
    stats = [device.memory_stats() for device in group if device.process_index == jax.process_index()]
    if not all(stats):  # a CPU: an eighth of the host's memory, or of that a half, a quarter..., while it is not free
        whole, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        share = int(whole * config.gpu_memory_utilization / 8)
        while share > free * config.gpu_memory_utilization / 2:
            share //= 2
        return share // config.tensor_parallel_size, "host memory"
    widest = model.q_width + 2 * model.kv_width + 2 * model.hidden_size + 3 * model.intermediate_size
    activations = config.max_num_batched_tokens * widest * 4 * 2 + config.max_num_seqs * model.vocab_size * 4 * 6
    layer_page = 2 * config.page_size * model.kv_width * jnp.dtype(config.dtype).itemsize
    staging = 2 * config.upload_pages_per_step * model.num_layers * layer_page if config.prefetch else 0
    free = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats) - activations - staging
    return int(free * config.gpu_memory_utilization), "device memory"
