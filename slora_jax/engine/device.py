"""The device arrays and compiled programs of one process. It knows pages and programs, not plans or requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from slora_jax.engine.batch import SAMPLER_FIELDS, TABLE_ROWS, set_table_rows
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.merge import MergeProgram
from slora_jax.engine.programs import StepKey, StepPrograms
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepSpec
from slora_jax.memory.pool import UPLOAD_PAGES, describe, pieces, put_pages, upload_adapter, upload_pages
from slora_jax.models import Params
from slora_jax.parallel.mesh import PAGES, POOL

TableRows = tuple[np.ndarray, np.ndarray]
"""`slot` and `pages` of one call of `set_table_rows`."""


class Copy:
    """Some pages of an adapter on their way to the device, in pieces."""

    def __init__(self, arrays: list[jax.Array]) -> None:
        self.arrays = arrays

    def is_there(self) -> bool:
        """Returns whether the copy has ended."""
        return all(array.is_ready() for array in self.arrays)  # type: ignore[attr-defined]

    def wait(self) -> None:
        """Waits for the copy. Raises the device's error if it failed."""
        for array in self.arrays:
            array.block_until_ready()


class Device:
    """Owns every device array of its process: parameters, pool, adapter table, sequence state. Arguments are plain
    numbers and NumPy arrays, so that they can be sent to other processes (`distributed.broadcast`). All methods but
    `read` return at once; the device runs their work in order.

    Pages of adapters, `contents [num_layers, n, 2, page_size, W]`, have all columns of the pool, or in one of several
    processes those of its own devices.
    """

    def __init__(self, spec: StepSpec, params: Params, config: EngineConfig) -> None:
        """Compiles every program and allocates the pool; `params` are placed already."""
        self.spec = spec
        self.params = params
        parallel = spec.parallel
        cache = config.compilation_cache_dir
        self.programs = StepPrograms(
            spec,
            config.buckets(),
            ahead=config.compile_ahead,
            progress=config.progress,
            cache_dir=None if cache is None else Path(cache).expanduser() / "programs",
        )
        self.pool = spec.pool.make_pool(None if parallel is None else parallel.sharding(POOL))
        self.table = spec.pool.make_table(None if parallel is None else parallel.replicated)
        self.state = spec.make_state()
        self._merge = MergeProgram(spec) if spec.lora == "merge" else None
        self._page_sharding = None if parallel is None else parallel.sharding(PAGES)
        self._columns = slice(0, spec.pool.width) if parallel is None else parallel.columns(spec.pool.width)
        if config.compile_ahead:
            self._warm_up()

    def step(
        self, key: StepKey, metadata: np.ndarray, rows: Sequence[TableRows], logprobs: bool | None
    ) -> tuple[Sampled, jax.Array]:
        """Dispatches the step program `key`. Returns what it sampled, and logits float32 `[S, vocab]` (several shards
        round the vocabulary up).

        Args:
          rows: of the page table, written before.
          logprobs: whether the sampler that follows also returns log-probabilities; None skips the sampler (greedy).
        """
        for slot, pages in rows:
            self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, slot, pages))
        program = self.programs.step(key)
        self.pool, self.state, output = program(self.params, self.pool, self.table, self.state, metadata)
        token, seqs = output.token, self.programs.bucket(key).seqs
        part = metadata[: len(SAMPLER_FIELDS) * seqs]
        if logprobs is not None:
            last_token, token = self.programs.sampler(seqs)(self.state.last_token, output.logits, part)
            self.state = replace(self.state, last_token=last_token)
        sampled = self.programs.scorer(seqs)(token, output.logits, part) if logprobs else Sampled(token)
        return sampled, output.logits

    def read(self, array: jax.Array) -> np.ndarray:
        """Waits for a result of a step."""
        return np.asarray(array)

    def upload(self, slot: int, pages: np.ndarray, ranks: np.ndarray, contents: np.ndarray) -> None:
        """Writes a whole adapter to the pool; later steps wait for it on the device."""
        self.pool, self.table = upload_adapter(
            self.pool, self.table, slot, pages, ranks, contents, self._page_sharding, self._columns.start
        )

    def begin_copy(self, contents: np.ndarray) -> Copy:
        """Begins the copy of some pages of an adapter, beside the steps.

        On a GPU, XLA copies NumPy arrays through page-locked buffers of its own, on a thread and a stream of their own
        (`PjRtStreamExecutorClient::BufferFromHostBuffer`), so neither the caller nor a running step waits. That is also
        why tiles are plain NumPy arrays: to keep gigabytes of them page-locked would spare that thread a copy in host
        memory, and no step anything.
        """
        return Copy([self._put(contents[:, piece]) for piece in pieces(0, contents.shape[1])])

    def move(self, copy: Copy, pages: np.ndarray) -> None:
        """Moves copied contents to these pages of the pool, within device memory."""
        for piece, array in zip(pieces(0, pages.size), copy.arrays, strict=True):
            self.pool = upload_pages(self.pool, pages[piece], array)

    def discard(self, copy: Copy) -> None:
        """Ends a copy whose contents are not wanted any more."""

    def describe(self, slot: int, pages: np.ndarray, ranks: np.ndarray) -> None:
        """Sets the adapter table's row `slot` to an adapter whose pages were moved."""
        self.table = describe(self.table, slot, pages, ranks)

    def merge(self, slot: int, sign: float) -> None:
        """Adds `sign` times the adapter in `slot` to the weights (`lora="merge"`)."""
        assert self._merge is not None
        self.params = self._merge(self.params, self.pool, self.table, slot, sign)

    @property
    def is_lost(self) -> bool:
        """Returns whether another process is lost, so that no call can be made."""
        return False

    def close(self) -> None:
        """No call follows."""

    def _put(self, contents: np.ndarray) -> jax.Array:
        """Begins the copy of an adapter's pages to the device, or of each device's part."""
        sharding = self._page_sharding
        if sharding is None:
            return jax.device_put(contents)
        return put_pages(contents, sharding, self._columns.start)  # type: ignore[return-value]

    def _warm_up(self) -> None:
        """Compiles what the steps do not contain: the uploads, rows of the page table. Writes only to padding."""
        shape = self.spec.pool
        width = self._columns.stop - self._columns.start
        for size in UPLOAD_PAGES:
            nowhere = np.full(size, shape.num_pages, np.int32)
            contents = np.zeros((shape.num_layers, size, 2, shape.page_size, width), self.pool[0].dtype)
            for staged in (put_pages(contents, self._page_sharding, self._columns.start), self._put(contents)):
                self.pool = upload_pages(self.pool, nowhere, staged)
        self.table = describe(self.table, 0, np.empty(0, np.int32), np.zeros(7, np.int32))
        padding = np.full(TABLE_ROWS, self.state.page_table.shape[0] - 1, np.int32)
        rows = np.zeros((TABLE_ROWS, self.state.page_table.shape[1]), np.int32)
        self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, padding, rows))
