"""The device side of the engine: arrays, compiled programs, dispatch. It knows plans and pages, not queues."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import BaseGeometry
from slora_jax.engine.batch import SAMPLER_FIELDS, TABLE_ROWS, build_metadata, set_table_rows, shared_rows
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.merge import AdapterMerge
from slora_jax.engine.programs import StepPrograms
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape, Resident, Upload, upload_adapter
from slora_jax.memory.pool import UPLOAD_PAGES, describe, pieces, put_pages, upload_pages
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


@dataclass(frozen=True)
class Landing:
    """A staged upload that has come to its end. error: why its pages are not in the pool, if they should be."""

    upload: Upload
    error: str | None = None


class Runner:
    """Owns every device array: parameters, pool, adapter table, sequence state, and pages on their way to the pool.

    An upload beside the steps takes two calls. `stage` begins the copy, which nothing that is dispatched depends on: on
    a GPU, XLA copies NumPy arrays through page-locked buffers of its own, on a thread and a stream of their own
    (`PjRtStreamExecutorClient::BufferFromHostBuffer`), so neither the caller nor a running step waits. That is also why
    tiles are plain NumPy arrays: to keep gigabytes of them page-locked would spare that thread a copy in host memory,
    and no step anything. `land`, once the copy is there, dispatches its move into the pool, within device memory.
    """

    def __init__(self, model: ModelConfig, graphdef: nnx.GraphDef, params: Params, config: EngineConfig) -> None:
        _check_processes(config)
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
        self._merge = AdapterMerge(self.spec) if config.lora == "merge" else None
        self.launch_seconds = 0.0
        self._staged: deque[tuple[Upload, list[tuple[slice, jax.Array]]]] = deque()
        self._warm_up()

    def upload(self, resident: Resident, contents: np.ndarray) -> None:
        """Dispatches an adapter's upload: `contents [num_layers, n, 2, page_size, W]` to its pages; of several devices,
        each is sent its own columns."""
        start = time.thread_time()
        if self._merge is not None:
            self._params = self._merge.before_upload(self._params, self.pool, self.table, resident)
        self.pool, self.table = upload_adapter(
            self.pool, self.table, resident.slot, resident.pages, resident.ranks, contents, self._page_sharding
        )
        self.launch_seconds += time.thread_time() - start

    @property
    def has_staged(self) -> bool:
        """Whether copies are under way that `land` has not reported."""
        return bool(self._staged)

    def stage(self, upload: Upload, contents: np.ndarray) -> None:
        """Begins the copy of these pages of an adapter, `contents [num_layers, n, 2, page_size, W]`.

        Raises:
          Whatever the device answers, memory above all. Nothing is staged then.
        """
        start = time.thread_time()
        parts = [(piece, self._put(contents[:, piece])) for piece in pieces(upload.first, upload.count)]
        self._staged.append((upload, parts))
        self.launch_seconds += time.thread_time() - start

    def land(self, wait: bool = False) -> list[Landing]:
        """Moves staged pages that have arrived into the pool, in the order of staging; with an adapter's last ones, its
        table row is set. wait: for the oldest, if none is there."""
        landings: list[Landing] = []
        start = time.thread_time()
        while self._staged:
            upload, parts = self._staged[0]
            if not (wait and not landings) and not all(self._is_there(array) for _, array in parts):
                break
            self._staged.popleft()
            landings.append(Landing(upload, self._move(upload, parts)))
        self.launch_seconds += time.thread_time() - start
        return landings

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step and returns at once; the copies of its results to the host are started too."""
        if self._merge is not None:
            self._params = self._merge.before_step(self._params, self.pool, self.table, plan)
        with_lora = self._merge is None and any(s.request.adapter_slot >= 0 for s in plan.sequences)
        segments = _segments(plan) if self.spec.lora == "bmm" else ()
        program, layout = self.programs.select(plan.num_tokens, len(plan.sequences), with_lora, segments)
        metadata, requests, samples = build_metadata(plan, layout)
        logprobs = any(r.params.logprobs is not None for r in requests)
        start = time.thread_time()
        for slot, pages in shared_rows(plan.hits, self.state.page_table):
            self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, slot, pages))
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

    def _put(self, contents: np.ndarray) -> jax.Array:
        """Begins the copy of an adapter's pages to the device, or of each device's part."""
        sharding = self._page_sharding
        return jax.device_put(contents) if sharding is None else put_pages(contents, sharding)  # type: ignore[return-value]

    @staticmethod
    def _is_there(array: jax.Array) -> bool:
        return bool(array.is_ready())  # type: ignore[attr-defined]  # not in the annotations of jax.Array

    def _move(self, upload: Upload, parts: list[tuple[slice, jax.Array]]) -> str | None:
        """Returns why the copy failed, if it did; the pool is not touched then."""
        resident = upload.resident
        if not resident.present:  # evicted meanwhile, and its pages may be others'
            return None
        try:
            for _, array in parts:
                array.block_until_ready()  # raises what befell the copy
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            return repr(error)
        if self._merge is not None:
            self._params = self._merge.before_upload(self._params, self.pool, self.table, resident)
        for piece, array in parts:
            self.pool = upload_pages(self.pool, resident.pages[piece], array)
        if upload.first + upload.count == resident.num_pages:
            self.table = describe(self.table, resident.slot, resident.pages, resident.ranks)
        return None

    @property
    def merges(self) -> int:
        """Times that an adapter was merged into the weights, under `lora="merge"`."""
        return 0 if self._merge is None else self._merge.merges

    def _warm_up(self) -> None:
        """Compiles what the steps do not contain: the uploads, rows of the page table. Writes only where nothing is
        kept."""
        for size in UPLOAD_PAGES:
            nowhere = np.full(size, self.shape.num_pages, np.int32)
            contents = np.zeros((self.shape.num_layers, size, *self.pool[0].shape[1:]), self.pool[0].dtype)
            for staged in (put_pages(contents, self._page_sharding), self._put(contents)):
                self.pool = upload_pages(self.pool, nowhere, staged)
        self.table = describe(self.table, 0, np.empty(0, np.int32), np.zeros(7, np.int32))
        nobody = np.full(TABLE_ROWS, self.state.page_table.shape[0] - 1, np.int32)
        rows = np.zeros((TABLE_ROWS, self.state.page_table.shape[1]), np.int32)
        self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, nobody, rows))


def _check_processes(config: EngineConfig) -> None:
    """Processes that serve one model plan each for itself, and must come to the same plans: from the same calls, and
    from nothing that only one of them sees. Raises ConfigError for settings by which they would not."""
    if jax.process_count() > 1 and config.tp > 1:
        if config.num_pages is None:
            raise ConfigError("EngineConfig.num_pages=None: free memory differs; with several processes give a number")
        if config.prefetch:
            raise ConfigError(f"EngineConfig.prefetch={config.prefetch}: must be 0 with several processes")


def _segments(plan: StepPlan) -> list[int]:
    """Rows of each adapter in a step."""
    rows: Counter[int] = Counter()
    for sequence in plan.sequences:
        rows[sequence.request.adapter_slot] += sequence.count
    return [count for slot, count in rows.items() if slot >= 0]


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
        lora=config.lora,
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
    if config.adapter_pages is not None and config.adapter_pages > num_pages - 2:
        raise ConfigError(
            f"EngineConfig.adapter_pages={config.adapter_pages}: of a pool of {num_pages} pages, one is the dummy page "
            "and one at least must be left for keys and values; lower it, raise num_pages, or use None"
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
    layer_page = 2 * config.page_size * model.kv_width * jnp.dtype(config.dtype).itemsize
    staging = 2 * config.upload_pages_per_step * model.num_layers * layer_page if config.prefetch else 0
    free = stats["bytes_limit"] - stats["bytes_in_use"] - activations - staging
    return int(free * config.memory_fraction), "device memory"
