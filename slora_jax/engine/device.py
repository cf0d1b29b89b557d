"""The device arrays and compiled programs of one process. Handles pages and programs, but no plans or requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from slora_jax.engine.batch import SAMPLER_FIELDS, TABLE_ROWS, set_table_rows
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.merge import MergeProgram
from slora_jax.engine.programs import StepKey, StepPrograms
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepOutput
from slora_jax.engine.step_spec import StepSpec
from slora_jax.memory.pool import UPLOAD_PAGES, describe, pieces, put_pages, upload_adapter, upload_pages
from slora_jax.models import Params
from slora_jax.parallel.mesh import PAGES, POOL

TableRows = tuple[np.ndarray, np.ndarray]
"""`slot` and `pages` of one call of `set_table_rows`."""


class Copy:
    """A copy of some pages of an adapter to the device, in pieces."""

    def __init__(self, arrays: list[jax.Array]) -> None:
        self.arrays = arrays

    def is_there(self) -> bool:
        """Returns whether the copy has finished."""
        return all(array.is_ready() for array in self.arrays)  # type: ignore[attr-defined]

    def wait(self) -> None:
        """Waits for the copy. Raises the device's error if it failed."""
        for array in self.arrays:
            array.block_until_ready()


class Device:
    """Owns every device array of its process: parameters, pool, adapter table, sequence state.

    All methods but `read` only dispatch; the device runs their work in order. Arguments are plain numbers and NumPy
    arrays, so that they can be sent to other processes (`distributed.broadcast`). `contents` are adapter pages
    `[num_layers, n, 2, tile_rows, W]`, with the columns of this process's devices.
    """

    def __init__(self, spec: StepSpec, params: Params, config: EngineConfig) -> None:
        """Compiles every program and allocates the pool. `params` are already on the devices."""
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
        self._unsampled: tuple[StepOutput, int, np.ndarray] | None = None  # of a step that `sample` follows
        self._merge = MergeProgram(spec) if spec.lora == "merge" else None
        self._page_sharding = None if parallel is None else parallel.sharding(PAGES)
        self._columns = slice(0, spec.pool.width) if parallel is None else parallel.columns(spec.pool.width)
        if config.compile_ahead:
            self._warm_up()

    def step(
        self, key: StepKey, metadata: np.ndarray, rows: Sequence[TableRows], after: Sequence[str] | None
    ) -> tuple[Sampled, StepOutput]:
        """Dispatches the step program `key`.

        Args:
          metadata: int32 `[layout.size]`, from `build_metadata`.
          rows: page-table rows to write before the step.
          after: the programs of `AFTER_STEP` to run. Without "sample", every sequence takes its most likely token. None
            leaves them to `sample`, which must follow before the next step.

        Returns:
          The sampled tokens (the greedy ones if `after` is None), and the step's output.
        """
        for slot, pages in rows:
            self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, slot, pages))
        program = self.programs.step(key)
        self.pool, self.state, output = program(self.params, self.pool, self.table, self.state, metadata)
        seqs = self.programs.bucket(key).seqs
        part = metadata[: len(SAMPLER_FIELDS) * seqs]
        if after is not None:
            return self._sample(output, seqs, part, after, ()), output
        self._unsampled = output, seqs, part
        return Sampled(output.token), output

    def sample(self, after: Sequence[str], edits: Sequence[np.ndarray]) -> Sampled:
        """Dispatches the programs after a step that left them to this call.

        Args:
          after: as in `step`.
          edits: the arrays of `LogitEdits`.
        """
        assert self._unsampled is not None
        (output, seqs, part), self._unsampled = self._unsampled, None
        return self._sample(output, seqs, part, after, edits)

    def _sample(
        self, output: StepOutput, seqs: int, part: np.ndarray, after: Sequence[str], edits: Sequence[np.ndarray]
    ) -> Sampled:
        run = partial(self.programs.after_step, seqs=seqs)
        token, logits = output.token, output.logits
        if edits:
            last_token, token, logits = run("constrain")(self.state.last_token, token, logits, part, *edits)
            self.state = replace(self.state, last_token=last_token)
        if "cutoff" in after:
            part = run("cutoff")(token, logits, part)
        if "sample" in after:
            last_token, token = run("sample")(self.state.last_token, token, logits, part)
            self.state = replace(self.state, last_token=last_token)
        return run("logprobs")(token, output.logits, part) if "logprobs" in after else Sampled(token)

    def read(self, array: jax.Array) -> np.ndarray:
        """Waits for a step's result and copies it to the host."""
        return np.asarray(array)

    def upload(self, slot: int, pages: np.ndarray, ranks: np.ndarray, contents: np.ndarray) -> None:
        """Uploads a whole adapter; later steps wait for it on the device."""
        self.pool, self.table = upload_adapter(
            self.pool, self.table, slot, pages, ranks, contents, self._page_sharding, self._columns.start
        )

    def begin_copy(self, contents: np.ndarray) -> Copy:
        """Starts the copy of some pages of an adapter, concurrent with the steps.

        On a GPU, XLA copies NumPy arrays through its own page-locked buffers, on a separate thread and stream
        (`PjRtStreamExecutorClient::BufferFromHostBuffer`), so neither the caller nor a running step waits. Keeping the
        tiles page-locked would save that thread a host copy but speed up no step, so they are plain NumPy arrays.
        """
        return Copy([self._put(contents[:, piece]) for piece in pieces(0, contents.shape[1])])

    def move(self, copy: Copy, pages: np.ndarray) -> None:
        """Moves copied contents into these pages of the pool, within device memory."""
        for piece, array in zip(pieces(0, pages.size), copy.arrays, strict=True):
            self.pool = upload_pages(self.pool, pages[piece], array)

    def discard(self, copy: Copy) -> None:
        """Drops a copy whose contents are no longer needed."""

    def describe(self, slot: int, pages: np.ndarray, ranks: np.ndarray) -> None:
        """Sets row `slot` of the adapter table to an adapter whose pages are in the pool."""
        self.table = describe(self.table, slot, pages, ranks)

    def merge(self, slot: int, sign: float) -> None:
        """Adds `sign` times the adapter in `slot` to the weights (`lora="merge"`)."""
        assert self._merge is not None
        self.params = self._merge(self.params, self.pool, self.table, slot, sign)

    @property
    def is_lost(self) -> bool:
        """True if another process is lost, so that no call can be made."""
        return False

    def close(self) -> None:
        """Ends the use of the device. No call may follow."""

    def _put(self, contents: np.ndarray) -> jax.Array:
        """Starts the copy of adapter pages, to each device its own columns."""
        sharding = self._page_sharding
        if sharding is None:
            return jax.device_put(contents)
        return put_pages(contents, sharding, self._columns.start)  # type: ignore[return-value]

    def _warm_up(self) -> None:
        """Compiles the programs outside the steps (uploads, page-table rows) by calls that write only to padding."""
        shape = self.spec.pool
        width = self._columns.stop - self._columns.start
        for size in UPLOAD_PAGES:
            out_of_range = np.full(size, shape.num_pages, np.int32)  # such writes are dropped
            contents = np.zeros((shape.num_layers, size, 2, shape.tile_rows, width), shape.weight_dtype)
            for staged in (put_pages(contents, self._page_sharding, self._columns.start), self._put(contents)):
                self.pool = upload_pages(self.pool, out_of_range, staged)
        self.table = describe(self.table, 0, np.empty(0, np.int32), np.zeros(7, np.int32))
        padding = np.full(TABLE_ROWS, self.state.page_table.shape[0] - 1, np.int32)
        rows = np.zeros((TABLE_ROWS, self.state.page_table.shape[1]), np.int32)
        self.state = replace(self.state, page_table=set_table_rows(self.state.page_table, padding, rows))
