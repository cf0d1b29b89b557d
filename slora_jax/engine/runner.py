"""From plans to what the devices do: programs, metadata, uploads. It knows plans and pages, not queues."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import BaseGeometry
from slora_jax.engine.batch import build_metadata, shared_rows
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.leader import Leader
from slora_jax.engine.merge import AdapterMerge
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepSpec
from slora_jax.engine.worker import Worker
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape, Resident, Upload
from slora_jax.models import ModelConfig, Params, load_model
from slora_jax.models.shards import shard_params
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.parallel.mesh import TensorParallel, cut, tensor_parallel
from slora_jax.parallel.processes import ProcessGroup
from slora_jax.scheduling import ScheduledSequence, StepPlan

logger = logging.getLogger("slora_jax")


@dataclass(frozen=True)
class InFlight:
    """A dispatched step: the sequences in the order of its batch, and what will come; logits float32 `[S, vocab]`
    (several shards round the vocabulary up), or None unless the engine keeps them."""

    sequences: list[ScheduledSequence]
    sampled: Sampled
    logits: jax.Array | None


@dataclass(frozen=True)
class Landing:
    """A staged upload that has come to its end. error: why its pages are not in the pool, if they should be."""

    upload: Upload
    error: str | None = None


class Runner:
    """Turns plans into calls of the `Worker`: which program, what metadata, which pages.

    An upload beside the steps takes two calls. `stage` begins the copy, which nothing that is dispatched depends on: on
    a GPU, XLA copies NumPy arrays through page-locked buffers of its own, on a thread and a stream of their own
    (`PjRtStreamExecutorClient::BufferFromHostBuffer`), so neither the caller nor a running step waits. That is also why
    tiles are plain NumPy arrays: to keep gigabytes of them page-locked would spare that thread a copy in host memory,
    and no step anything. `land`, once the copy is there, dispatches its move into the pool, within device memory.
    """

    def __init__(
        self,
        model: ModelConfig,
        graphdef: nnx.GraphDef,
        params: Params,
        config: EngineConfig,
        processes: ProcessGroup | None = None,
    ) -> None:
        spec, params = place(model, graphdef, params, config, processes)
        self.worker = Worker(spec, params, config) if processes is None else Leader(spec, params, config, processes)
        self.shape = spec.pool
        self._lora = spec.lora
        self._merge = AdapterMerge(spec) if config.lora == "merge" else None
        self._keep_logits = config.keep_logits
        self._staged: deque[Upload] = deque()
        self.launch_seconds = 0.0

    def upload(self, resident: Resident, contents: np.ndarray) -> None:
        """Dispatches an adapter's upload: `contents [num_layers, n, 2, page_size, W]` to its pages; of several devices,
        each is sent its own columns."""
        start = time.thread_time()
        self._merge_before_upload(resident)
        self.worker.upload(resident.slot, resident.pages, resident.ranks, contents)
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
        self.worker.stage(contents[:, upload.first : upload.first + upload.count])
        self._staged.append(upload)
        self.launch_seconds += time.thread_time() - start

    def land(self, wait: bool = False) -> list[Landing]:
        """Moves staged pages that have arrived into the pool, in the order of staging; with an adapter's last ones, its
        table row is set. wait: for the oldest, if none is there."""
        landings: list[Landing] = []
        start = time.thread_time()
        while self._staged:
            if not (wait and not landings) and not self.worker.has_arrived():
                break
            upload = self._staged.popleft()
            landings.append(Landing(upload, self._move(upload)))
        self.launch_seconds += time.thread_time() - start
        return landings

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step and returns at once; the copies of its results to the host are started too."""
        worker = self.worker
        if self._merge is not None:
            worker.params = self._merge.before_step(worker.params, worker.pool, worker.table, plan)
        with_lora = self._merge is None and any(s.request.adapter_slot >= 0 for s in plan.sequences)
        segments = _segments(plan) if self._lora == "bmm" else ()
        key, layout = worker.programs.select(plan.num_tokens, plan.num_sequences, with_lora, segments)
        metadata, sequences = build_metadata(plan, layout)
        logprobs = any(s.request.params.logprobs is not None or s.start < s.request.num_scored for s in sequences)
        has_sampler = logprobs or any(s.request.params.temperature > 0 for s in sequences)
        start = time.thread_time()
        rows = list(shared_rows(plan.hits, worker.state.page_table))
        sampled, logits = worker.step(key, metadata, rows, logprobs if has_sampler else None)
        self.launch_seconds += time.thread_time() - start
        step = InFlight(sequences, sampled, logits if self._keep_logits else None)
        if not worker.spec.layered:  # on a CPU they are read where they lie
            for leaf in jax.tree.leaves((step.sampled, step.logits)):
                leaf.copy_to_host_async()
        return step

    def read(self, step: InFlight) -> np.ndarray:
        """Waits for a step's tokens, int32 `[S]`."""
        return self.worker.read(step.sampled.token)

    @property
    def merges(self) -> int:
        """Times that an adapter was merged into the weights, under `lora="merge"`."""
        return 0 if self._merge is None else self._merge.merges

    def _move(self, upload: Upload) -> str | None:
        """Returns why the copy failed, if it did; the pool is not touched then."""
        resident, worker = upload.resident, self.worker
        if not resident.present:  # evicted meanwhile, and its pages may be others'
            worker.discard()
            return None
        try:
            worker.wait()
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            worker.discard()
            return repr(error)
        self._merge_before_upload(resident)
        last = upload.first + upload.count
        worker.move(resident.pages[upload.first : last])
        if last == resident.num_pages:
            worker.describe(resident.slot, resident.pages, resident.ranks)
        return None

    def _merge_before_upload(self, resident: Resident) -> None:
        worker = self.worker
        if self._merge is not None:
            worker.params = self._merge.before_upload(worker.params, worker.pool, worker.table, resident)


_SETTINGS_OF_ALL = (
    *("dtype", "adapter_pages", "page_size", "max_seqs", "max_tokens_per_step", "max_model_len", "adapter_slots"),
    *("max_rank", "decode_buckets", "mixed_buckets", "kernels", "tp", "tp_lora", "lora"),
)
"""Settings that the pool and the step programs depend on."""


def load(model_dir: str | Path, config: EngineConfig) -> tuple[ModelConfig, nnx.GraphDef, Params]:
    """A Hugging Face directory or GGUF file on the devices of `config`; of several processes, each loads what its own
    devices hold.

    Raises:
      ConfigError: there are not enough devices, or the model cannot be cut over them.
      UnsupportedModelError, CheckpointError: see `models.load_model`.
    """
    model = ModelConfig.from_directory(model_dir)
    parallel = tensor_parallel(model, config.tp, config.tp_lora, config.tp_first_device)
    graphdef, params, model = load_model(model_dir, config.dtype, config.model_cache_dir, config.progress, parallel)
    return model, graphdef, params


def place(
    model: ModelConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    config: EngineConfig,
    processes: ProcessGroup | None = None,
) -> tuple[StepSpec, Params]:
    """What the step programs depend on, and the parameters on their devices; several processes come to the same.

    Raises:
      ConfigError: settings, model and devices do not fit together, or differ between processes.
    """
    parallel = tensor_parallel(model, config.tp, config.tp_lora, config.tp_first_device)
    if (processes is None) != (parallel is None or jax.process_count() == 1):
        raise ConfigError(
            f"EngineConfig.tp={config.tp}, processes={processes}: {jax.process_count()} processes run; several serve "
            "one model over all of their devices (tp), and are given what join_processes returned"
        )
    if parallel is not None:
        graphdef, params = shard_params(model, params, parallel)
    if processes is not None:
        settings = {f"EngineConfig.{name}": getattr(config, name) for name in _SETTINGS_OF_ALL}
        settings |= {f"the model's {name}": value for name, value in asdict(model).items()}
        pages = config.num_pages or pages_that_fit(model, config)
        config = replace(config, num_pages=processes.agree(settings, pages, is_given=config.num_pages is not None))
    struct = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if parallel is None else x.sharding), params
    )
    return step_spec(model, graphdef, struct, config, pool_shape(model, config), parallel), params


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
    """The pool of an engine, over all its devices; `num_pages=None` is decided by `pages_that_fit`.

    Raises:
      ConfigError: free memory holds no pool, or the model cannot be cut into `config.tp` shards.
    """
    num_pages = config.num_pages or pages_that_fit(model, config)
    geometry = adapter_geometry(model, config.page_size, cut(model, config.tp, config.tp_lora))
    if config.adapter_pages is not None and config.adapter_pages > num_pages - 2:
        raise ConfigError(
            f"EngineConfig.adapter_pages={config.adapter_pages}: of a pool of {num_pages} pages, one is the dummy page "
            "and one at least must be left for keys and values; lower it, raise num_pages, or use None"
        )
    largest = int(geometry.layout.num_pages(np.full(7, config.max_rank)))
    return PoolShape(
        num_layers=model.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        width=geometry.pool_width,
        dtype=config.dtype,
        adapter_slots=config.adapter_slots or min(num_pages - 1, 4096),
        max_adapter_pages=min(largest, num_pages - 1),
    )


def pages_that_fit(model: ModelConfig, config: EngineConfig) -> int:
    """Pages of a pool in a device's free memory, once its part of the model is there; logged.

    Raises:
      ConfigError: free memory holds no pool, or the model cannot be cut into `config.tp` shards.
    """
    shards = cut(model, config.tp, config.tp_lora)
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
    """Bytes the pool may take of a device that runs `model`, and a word on where they are."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:  # a CPU: an eighth of the host's memory, or of that a half, a quarter..., while it is not free
        whole, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        share = int(whole * config.memory_fraction / 8)
        while share > free * config.memory_fraction / 2:
            share //= 2
        return share // config.tp, "host memory"
    widest = model.q_width + 2 * model.kv_width + 2 * model.hidden_size + 3 * model.intermediate_size
    activations = config.max_tokens_per_step * widest * 4 * 2 + config.max_seqs * model.vocab_size * 4 * 6
    layer_page = 2 * config.page_size * model.kv_width * jnp.dtype(config.dtype).itemsize
    staging = 2 * config.upload_pages_per_step * model.num_layers * layer_page if config.prefetch else 0
    free = stats["bytes_limit"] - stats["bytes_in_use"] - activations - staging
    return int(free * config.memory_fraction), "device memory"
