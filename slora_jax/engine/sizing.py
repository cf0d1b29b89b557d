"""Sizes derived from a model and the settings: the longest sequence, the pool, the spec of the step programs."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ENDS, EXPERT_PROJECTIONS, ceil_div, tile_rows
from slora_jax.adapters import BaseGeometry
from slora_jax.adapters.adapter import extended
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.step_spec import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, Params
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.parallel.mesh import TensorParallel, cut

logger = logging.getLogger("slora_jax")


def engine_geometry(model: ModelConfig, config: EngineConfig) -> BaseGeometry:
    """Returns the geometry of the adapters in an engine's pool.

    Raises:
      ConfigError: `tensor_parallel_size` does not divide the model's widths.
    """
    shards = cut(model, config.tensor_parallel_size, config.tp_lora)
    return adapter_geometry(model, tile_rows(config.page_size, config.kv_dtype), shards)


def adapter_geometry(model: ModelConfig, page_size: int, shards: Shards = ONE_DEVICE) -> BaseGeometry:
    """Returns the widths of a base model that adapters depend on, and its sharding. page_size: rows of a tile."""
    return BaseGeometry(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        q_width=model.q_width,
        kv_width=model.kv_width,
        intermediate_size=model.intermediate_size,
        page_size=page_size,
        shards=shards,
        vocab_size=model.vocab_size,
        expert_layers=tuple(kind.has_experts for kind in model.kinds) if model.experts else (),
        num_experts=model.experts.count if model.experts else 0,
        expert_width=model.experts.intermediate_size if model.experts else 0,
    )


def longest_sequence(model: ModelConfig, config: EngineConfig) -> int:
    """Returns the maximum tokens of prompt and output. Raises ConfigError if `max_model_len` exceeds the positions."""
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
    """Returns the spec of an engine's step programs. `params` has `jax.ShapeDtypeStruct` leaves; with `parallel`, it
    and `graphdef` are from `models.init.abstract_shards`."""
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
        adapter_extras=config.adapter_extras,
    )


def pool_shape(model: ModelConfig, config: EngineConfig) -> PoolShape:
    """Returns the shape of an engine's pool, over all its devices.

    Raises:
      ConfigError: as `pages_that_fit`, or `adapter_pages` leaves no page for KV.
    """
    num_pages = config.num_pages or pages_that_fit(model, config)
    geometry = engine_geometry(model, config)
    if config.adapter_pages is not None and config.adapter_pages > num_pages - 2:
        raise ConfigError(
            f"EngineConfig.adapter_pages={config.adapter_pages}: must be at most {num_pages - 2}, because the pool's "
            f"{num_pages} pages include the dummy page and at least one page for KV; lower it, raise num_pages, or use "
            "None"
        )
    pool, ranks = _pool(model, config, num_pages), np.full(7, config.max_lora_rank)
    if config.adapter_extras:
        ends = dict.fromkeys(ENDS if config.tensor_parallel_size == 1 else (), config.max_lora_rank)
        experts = np.full((pool.experts, len(EXPERT_PROJECTIONS)), config.max_lora_rank)
        ranks = extended(ranks, True, ends, experts)
    largest = int(geometry.layout.num_pages(ranks))
    return replace(pool, max_adapter_pages=min(largest, num_pages - 1))


def _pool(model: ModelConfig, config: EngineConfig, num_pages: int) -> PoolShape:
    """A pool of this many pages, for adapters of no page."""
    served = config.adapter_extras and config.tensor_parallel_size == 1
    experts = model.experts.count if served and model.experts else 0
    return PoolShape(
        num_layers=model.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        width=engine_geometry(model, config).pool_width,
        dtype=config.dtype,
        adapter_slots=config.slots(num_pages),
        max_adapter_pages=0,
        kv_dtype=config.kv_dtype,
        head_dim=model.head_dim,
        experts=experts,
    )


def pages_that_fit(model: ModelConfig, config: EngineConfig) -> int:
    """Returns, and logs, the number of pages that fit into a device's free memory after the model is loaded.

    Raises:
      ConfigError: free memory holds fewer than 2 pages, or `tensor_parallel_size` does not divide the model's widths.
    """
    shards = cut(model, config.tensor_parallel_size, config.tp_lora)
    page_bytes = _pool(model, config, num_pages=1).page_bytes // shards.count  # per device
    free, where = _free_memory(shards.of_model(model), config, page_bytes)
    num_pages = coarse(free // page_bytes)
    size = f"{page_bytes / 2**20:.2f} MiB each over all layers, {num_pages * page_bytes / 2**30:.2f} GiB of {where}"
    message = f"pool: {num_pages} pages of {config.page_size} tokens ({size})"
    logger.info(message)
    if config.progress:
        tqdm.write(message, file=sys.stderr)
    if num_pages < 2:
        raise ConfigError(
            f"EngineConfig.num_pages=None: the {free} bytes of {where} that the pool may use hold fewer than 2 pages "
            f"of {page_bytes} bytes; set num_pages, or raise gpu_memory_utilization"
        )
    return num_pages


def coarse(num_pages: int) -> int:
    """Rounds `num_pages` down to five significant bits, at most 6% less.

    The pool's size is part of every compiled program, and free memory varies between starts. With rounding, a start can
    reuse the programs of an earlier one.
    """
    unit = 1 << max(0, num_pages.bit_length() - 5)
    return num_pages // unit * unit


def _free_memory(model: ModelConfig, config: EngineConfig, page_bytes: int) -> tuple[int, str]:
    """Returns the bytes that the pool may use on each device, and the kind of memory. `model` is a shard's
    model, `page_bytes` a page's bytes on a device."""
    size = config.tensor_parallel_size
    group = jax.devices()[config.tp_first_device :][:size] if size > 1 else jax.local_devices()[:1]
    stats = [device.memory_stats() for device in group if device.process_index == jax.process_index()]
    if not all(stats):  # a CPU: an eighth of the host's memory, halved until it is free
        whole, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        share = int(whole * config.gpu_memory_utilization / 8)
        while share > free * config.gpu_memory_utilization / 2:
            share //= 2
        return share // config.tensor_parallel_size, "host memory"
    hidden = 3 * model.intermediate_size
    if model.experts is not None:
        hidden = max(hidden, model.experts.per_token * (3 * model.experts.intermediate_size + 2 * model.hidden_size))
    widest = model.q_width + 2 * model.kv_width + 2 * model.hidden_size + hidden
    activations = config.max_num_batched_tokens * widest * 4 * 2 + config.max_num_seqs * model.vocab_size * 4 * 6
    staging = 2 * config.upload_pages_per_step * page_bytes if config.prefetch else 0
    free = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats) - activations - staging
    return int(free * config.gpu_memory_utilization), "device memory"
