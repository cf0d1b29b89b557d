"""The device side of the engine: arrays, compiled programs, dispatch. It knows plans and pages, not queues."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import BaseGeometry
from slora_jax.engine.batch import SAMPLER_FIELDS, build_metadata
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.programs import StepPrograms
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape, Resident, upload_adapter
from slora_jax.memory.pool import UPLOAD_PAGES, put_pages, set_table_row, upload_pages
from slora_jax.models import ModelConfig, Params
from slora_jax.models.shards import shard_params
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.parallel.mesh import PAGES, POOL, TensorParallel, cut, tensor_parallel
from slora_jax.scheduling import Request, StepPlan

logger = logging.getLogger("slora_jax")


@dataclass(frozen=True)
class InFlight:
    """A dispatched step: its requests in the order of its sequences, whether each sampled, and what will come; logits
    float32 `[S, vocab]` (several shards round the vocabulary up), or None unless the engine keeps them."""

    requests: list[Request]
    samples: list[bool]
    sampled: Sampled
    logits: jax.Array | None


class Runner:
    """Owns every device array: parameters, pool, adapter table, sequence state."""

    def __init__(self, model: ModelConfig, graphdef: nnx.GraphDef, params: Params, config: EngineConfig) -> None:
        parallel = tensor_parallel(model, config.tp, config.tp_lora, config.tp_first_device)
        if parallel is not None:
            graphdef, params = shard_params(model, params, parallel)
        self._params = params
        self._keep_logits = config.keep_logits
        self.shape = pool_shape(model, config)
        struct = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if parallel is None else x.sharding), params
        )
        self.spec = step_spec(model, graphdef, struct, config, self.shape, parallel)
        self.programs = StepPrograms(self.spec, config.buckets(), progress=config.progress)
        self.pool = self.shape.make_pool(None if parallel is None else parallel.sharding(POOL))
        self.table = self.shape.make_table(None if parallel is None else parallel.replicated)
        self.state = self.spec.make_state()
        self.launch_seconds = 0.0
        self._warm_up()

    def upload(self, resident: Resident, contents: np.ndarray) -> None:
        """Dispatches an adapter's upload: `contents [num_layers, n, 2, page_size, W]` to its pages; of several devices,
        each is sent its own columns."""
        start = time.thread_time()
        self.pool, self.table = upload_adapter(
            self.pool, self.table, resident.slot, resident.pages, resident.ranks, contents, self._page_sharding
        )
        self.launch_seconds += time.thread_time() - start

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step and returns at once; the copies of its results to the host are started too."""
        with_lora = any(s.request.adapter_slot >= 0 for s in plan.sequences)
        program, layout = self.programs.select(plan.num_tokens, len(plan.sequences), with_lora)
        metadata, requests, samples = build_metadata(plan, layout)
        logprobs = any(r.params.logprobs is not None for r in requests)
        start = time.thread_time()
        self.pool, self.state, output = program(self._params, self.pool, self.table, self.state, metadata)
        sampled = Sampled(output.token)
        if logprobs or any(r.params.temperature > 0 for r in requests):
            seqs = layout.bucket.seqs
            sampler, part = self.programs.sampler(seqs, logprobs), metadata[: len(SAMPLER_FIELDS) * seqs]
            last_token, sampled = sampler(self.state.last_token, output.logits, part)
            self.state = replace(self.state, last_token=last_token)
        self.launch_seconds += time.thread_time() - start
        logits = output.logits if self._keep_logits else None
        for leaf in jax.tree.leaves((sampled, logits)):
            leaf.copy_to_host_async()
        return InFlight(requests, samples, sampled, logits)

    @property
    def _page_sharding(self) -> jax.sharding.NamedSharding | None:
        parallel = self.spec.parallel
        return None if parallel is None else parallel.sharding(PAGES)

    def _warm_up(self) -> None:
        """Compiles what the steps do not contain: the uploads. Writes only where nothing is kept."""
        for size in UPLOAD_PAGES:
            nowhere = np.full(size, self.shape.num_pages, np.int32)
            contents = np.zeros((self.shape.num_layers, size, *self.pool[0].shape[1:]), self.pool[0].dtype)
            self.pool = upload_pages(self.pool, nowhere, put_pages(contents, self._page_sharding))
        empty = np.zeros(self.shape.max_adapter_pages, np.int32)
        self.table = set_table_row(self.table, np.int32(0), empty, np.zeros(7, np.int32))


def adapter_geometry(model: ModelConfig, page_size: int, shards: Shards = ONE_DEVICE) -> BaseGeometry:
    """What adapters must know of a base model, and how it is cut."""
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
        raise ConfigError(f"EngineConfig.max_model_len={config.max_model_len}: the model has {positions} positions")
    return config.max_model_len or model.max_position_embeddings


def step_spec(
    model: ModelConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    config: EngineConfig,
    shape: PoolShape,
    parallel: TensorParallel | None = None,
) -> StepSpec:
    """What an engine's step programs depend on. params: `jax.ShapeDtypeStruct` leaves; with `parallel`, graphdef and
    params are those of `models.init.abstract_shards`."""
    return StepSpec(
        model=model,
        graphdef=graphdef,
        params=params,
        pool=shape,
        max_seqs=config.max_seqs,
        max_pages_per_seq=ceil_div(longest_sequence(model, config), config.page_size),
        max_rank=config.max_rank,
        kernels=None if config.kernels == "auto" else config.kernels,  # type: ignore[arg-type]
        parallel=parallel,
    )


def pool_shape(model: ModelConfig, config: EngineConfig) -> PoolShape:
    """The pool of an engine, over all its devices; `num_pages=None` is decided here, from a device's free memory, and
    logged.

    Raises:
      ConfigError: free memory holds no pool, or the model cannot be cut into `config.tp` shards.
    """
    shards = cut(model, config.tp, config.tp_lora)
    geometry = adapter_geometry(model, config.page_size, shards)
    layout = geometry.layout
    page_bytes = model.num_layers * 2 * config.page_size * layout.width * jnp.dtype(config.dtype).itemsize  # a device's
    num_pages = config.num_pages
    if num_pages is None and jax.process_count() > 1:
        raise ConfigError("EngineConfig.num_pages=None: with several processes, give one number to all")
    if num_pages is None:
        free, where = _free_memory(shards.of_model(model), config)
        num_pages = free // page_bytes
        size = f"{page_bytes / 2**20:.2f} MiB each over all layers, {num_pages * page_bytes / 2**30:.2f} GiB of {where}"
        message = f"pool: {num_pages} pages of {config.page_size} tokens ({size})"
        logger.info(message)
        if config.progress:
            tqdm.write(message, file=sys.stderr)
        if num_pages < 2:
            raise ConfigError(
                f"EngineConfig.num_pages=None: {free} bytes of {where} hold no pool; page = {page_bytes} bytes"
            )
    largest = int(layout.num_pages(np.full(7, config.max_rank)))
    return PoolShape(
        num_layers=model.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        width=geometry.pool_width,
        dtype=config.dtype,
        adapter_slots=config.adapter_slots or min(num_pages - 1, 4096),
        max_adapter_pages=min(largest, num_pages - 1),
    )


def _free_memory(model: ModelConfig, config: EngineConfig) -> tuple[int, str]:
    """Bytes the pool may take of a device that runs `model`, and a word on where they are."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:  # a CPU: leave most of the host's memory to the host
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(free * config.memory_fraction / 4 / config.tp), "host memory"
    widest = model.q_width + 2 * model.kv_width + 2 * model.hidden_size + 3 * model.intermediate_size
    activations = config.max_tokens_per_step * widest * 4 * 2 + config.max_seqs * model.vocab_size * 4 * 6
    free = stats["bytes_limit"] - stats["bytes_in_use"] - activations
    return int(free * config.memory_fraction), "device memory"
