"""The jitted step: `step(params, pool, table, state, metadata) -> (pool, state, output)`, pool and state donated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import devices
from pallas_kernels.experts import expert_outputs
from pallas_kernels.kv_format import pages_of
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles, ends, vectors
from pallas_kernels.lora import experts as expert_lora
from pallas_kernels.lora.bmm import Padding
from pallas_kernels.paged_attention import PagedAttention
from pallas_kernels.pool_write import NO_PAGE, write_kv
from pallas_kernels.weight_format import Kernels, codes_of
from slora_jax.engine.batch import BatchLayout, Bucket, SequenceState, StepBatch, unpack
from slora_jax.engine.sampling import greedy
from slora_jax.engine.step_spec import Lora, StepSpec, with_extras
from slora_jax.memory import Pool
from slora_jax.models import Params
from slora_jax.models.decoder import Embedding
from slora_jax.models.quantised import INT4_OPTIONS
from slora_jax.models.traits import Activation
from slora_jax.parallel import vocabulary
from slora_jax.parallel.lora import add_lora
from slora_jax.parallel.mesh import AXIS, LOGITS, POOL, REPLICATED, TensorParallel

GPU_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
"""XLA's options for a step on a GPU. By default the step's CUDA graph is one chain, in the order of the schedule; here
a kernel waits only for those that write what it reads, or use the memory that it writes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """Result of a step.

    Attributes:
      token: most likely next token of each sequence, int32 `[S]`.
      logits: float32 `[S, vocab]`. With several shards, split by vocabulary and padded to a multiple of them.
      pooled: of each sequence's rows, the sum of the hidden states and the last one, float32 `[2, S, d]`; None unless
        the bucket pools.
    """

    token: jax.Array
    logits: jax.Array
    pooled: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraStep:
    """The LoRA work of the layers of a step. `rows` is None in a program without extras, `experts` in one without
    LoRA on experts."""

    product: LoraProduct
    rows: vectors.VectorRows | None
    experts: expert_lora.ExpertTable | None


class PagedContext:
    """The model's access to the unified pool while a step, or one layer of it, is traced (a `models.StepContext`).

    With several shards, it handles one shard's part and adds the collectives.

    Args:
      pool: arrays of all layers, or of one. Layer numbers in `attend` and `lora` are indices into it.
      lora: the layers' LoRA work (`lora_work`), or None.
      end_rows: the LoRA work outside the layers (`end_work`), or None. It needs the arrays of all layers in `pool`.
    """

    def __init__(
        self,
        pool: Pool,
        batch: StepBatch,
        lora: LoraStep | None,
        spec: StepSpec,
        layout: BatchLayout,
        end_rows: ends.EndRows | None = None,
    ) -> None:
        model, bucket = spec.shard_model, layout.bucket
        self.pool = list(pool)
        self._shards = spec.shards
        self._spec = spec
        self._batch = batch
        self._attention = {
            window: PagedAttention(
                batch.attention,
                num_heads=model.num_heads,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                page_size=layout.page_size,
                dtype=spec.pool.dtype,
                kv_dtype=spec.pool.narrow_kv,
                decode=bucket.decode,
                tile_rows=bucket.prefill_tile_rows,
                window=window,
                score_cap=model.score_cap,
                implementation=spec.attention_kernels(bucket.decode),
                interpret=spec.interpret,
            )
            for window in dict.fromkeys(kind.window for kind in model.kinds)
        }
        self._layout = spec.lora_layout
        self._stacks = {stack.name: stack for stack in self._layout.stacks}
        self._lora, self._ends = lora, end_rows

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        """Writes the step's KV into the pool, then attends over each sequence's pages."""
        rows, batch = q.shape[0], self._batch
        self.pool[layer] = write_kv(
            self.pool[layer], k.reshape(rows, -1), v.reshape(rows, -1), batch.page, batch.offset
        )
        with jax.named_scope("attention"):
            return self._attention[window](q, self.pool[layer])

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds the LoRA product of a stack to `y`. Adds no operation in a program without LoRA."""
        if self._lora is None:
            return y
        product, pool, place = self._lora.product, pages_of(self.pool[layer]), self._stacks[stack]
        if self._lora.rows is not None:
            with jax.named_scope("lora_vectors"):
                y = vectors.apply(y, pool, place, self._layout, self._lora.rows)
        with jax.named_scope("lora"):
            if self._shards.count == 1:
                return product(x, y, pool, place)
            return add_lora(product, self._shards, x, y, pool, place)

    def lookup(self, embedding: Embedding, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of `tokens`, summed over the shards, with their adapters' changes."""
        if self._ends is not None:
            return ends.add_embedding(tokens, embedding(tokens), self._pages(), self._layout, self._ends)
        if self._shards.count == 1:
            return embedding(tokens)
        return vocabulary.embed(embedding, tokens, embedding.embedding[...].shape[0])

    def head(self, hidden: jax.Array, logits: jax.Array) -> jax.Array:
        """Adds the adapters' changes of the head. Adds no operation in a program without extras."""
        if self._ends is None:
            return logits
        with jax.named_scope("lora_head"):
            return ends.add_head(hidden, logits, self._pages(), self._layout, self._ends)

    def _pages(self) -> list[jax.Array]:
        """The layers' arrays with adapter weights."""
        return [pages_of(layer) for layer in self.pool]

    def experts(
        self, layer: int, x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernels, down: Kernels,
        activation: Activation,
    ) -> jax.Array:  # fmt: skip
        """Adds up the outputs of each token's experts. Padding has no experts, so that it reads no weights."""
        chosen = jnp.where((self._batch.page != NO_PAGE)[:, None], chosen, codes_of(gate_up).shape[0])
        lora: Any = None
        if self._lora is not None and self._lora.experts is not None:
            table, pool, layout = self._lora.experts, pages_of(self.pool[layer]), self._layout
            lora = lambda order: expert_lora.products(table, chosen, order, pool, layout)  # noqa: E731
        return expert_outputs(
            x, chosen, weights, gate_up, down, activation=activation,
            implementation=self._spec.expert_kernels, interpret=self._spec.interpret, lora=lora,
        )  # fmt: skip

    def reduce(self, y: jax.Array) -> jax.Array:
        """Sums row-parallel products, with their LoRA part, over the shards."""
        if self._shards.count == 1:
            return y
        with jax.named_scope("all_reduce_base"):
            return jax.lax.psum(y, AXIS)


def lora_work(
    spec: StepSpec, layout: BatchLayout, table: AdapterTable, tiles: LoraTiles, with_lora: Lora
) -> LoraStep | None:
    """Locates the adapter weights of a step, once for all layers. Returns None in a program without LoRA."""
    if not with_lora:
        return None
    with jax.named_scope("lora_prepare"):
        product = LoraProduct(
            spec.lora_layout,
            table,
            tiles,
            dtype=spec.pool.dtype,
            decode=layout.bucket.decode,
            tile_rows=layout.lora_tile_rows,
            max_rank=spec.max_rank,
            split=spec.shards.count > 1,
            implementation=spec.lora_kernels,
            interpret=spec.interpret,
            padding=with_lora if isinstance(with_lora, Padding) else None,
        )
        rows = vectors.prepare(spec.lora_layout, table, tiles) if with_extras(with_lora) else None
        experts = None
        if with_lora == "experts":
            experts = expert_lora.prepare(
                spec.lora_layout, table, tiles, dtype=spec.pool.dtype, decode=layout.bucket.decode,
                max_rank=spec.max_rank, implementation=spec.lora_kernels, interpret=spec.interpret,
            )  # fmt: skip
        return LoraStep(product, rows, experts)


def end_work(spec: StepSpec, table: AdapterTable, batch: StepBatch, with_lora: Lora) -> ends.EndRows | None:
    """Locates the adapters' changes of embedding and head. Returns None in a program without them."""
    if not spec.has_ends(with_lora):
        return None
    length = batch.attention.length
    return ends.prepare(spec.lora_layout, table, batch.lora, batch.last_row, length, spec.max_rank)


def make_step(spec: StepSpec, layout: BatchLayout, with_lora: Lora) -> Any:
    """Returns the jitted step of a bucket, `(params, pool, table, state, metadata) -> (pool, state, StepOutput)`.

    Pool and state are donated; metadata is int32 `[layout.size]`. For an absent GPU, call it under
    `devices.compiling_for`, which selects the compiler's options.
    """

    def step(
        params: Params, pool: Pool, table: AdapterTable, state: SequenceState, metadata: jax.Array
    ) -> tuple[Pool, SequenceState, StepOutput]:
        batch, state = unpack(metadata, state, layout)
        model = nnx.merge(spec.graphdef, params)
        lora, end_rows = lora_work(spec, layout, table, batch.lora, with_lora), end_work(spec, table, batch, with_lora)
        context = PagedContext(pool, batch, lora, spec, layout, end_rows)
        hidden = model(batch.token, batch.position, context)  # [T, d]
        logits = model.logits(hidden[batch.last_row], context)  # [S, vocab]
        token = greedy_token(spec, logits)
        state = SequenceState(page_table=state.page_table, last_token=state.last_token.at[batch.slot].set(token))
        return tuple(context.pool), state, StepOutput(token, logits, pooled_states(layout, batch, hidden))

    if spec.parallel is not None:
        pool = (POOL,) * spec.pool.num_layers
        params = jax.tree.map(lambda leaf: leaf.sharding.spec, spec.params)
        step = jax.shard_map(
            step,
            mesh=spec.parallel.mesh,
            in_specs=(params, pool, REPLICATED, REPLICATED, REPLICATED),
            out_specs=(pool, REPLICATED, output_specs(layout)),
            check_vma=False,
        )
    step.__name__ = step_name(layout.bucket, with_lora)
    options = None if devices.target() is None else GPU_OPTIONS | (INT4_OPTIONS if spec.model.weights == "int4" else {})
    return jax.jit(step, donate_argnums=(1, 3), compiler_options=options)


def greedy_token(spec: StepSpec, logits: jax.Array) -> jax.Array:
    """Returns the token with the largest logit of each row, int32 `[S]`. With shards, `logits` is one shard's part."""
    return greedy(logits) if spec.parallel is None else vocabulary.greedy(logits, spec.model.vocab_size)


def pooled_states(layout: BatchLayout, batch: StepBatch, hidden: jax.Array) -> jax.Array | None:
    """Returns `StepOutput.pooled` of `hidden [T, d]`; None unless the bucket pools."""
    if not layout.bucket.pools:
        return None
    attention, row = batch.attention, jnp.arange(hidden.shape[0])
    first = attention.first_row[:, None]
    is_own = (row >= first) & (row < first + attention.length[:, None])  # [S, T]
    wide = hidden.astype(jnp.float32)
    total = jnp.dot(is_own.astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST)
    return jnp.stack([total, wide[batch.last_row]])


def output_specs(layout: BatchLayout) -> StepOutput:
    """Returns the sharding of each field of a step's output."""
    pooled = REPLICATED if layout.bucket.pools else None
    return StepOutput(REPLICATED, LOGITS, pooled)  # type: ignore[arg-type]


def step_name(bucket: Bucket, with_lora: Lora) -> str:
    """Name of `make_step`'s program."""
    padding = f"_{with_lora.segments}x{with_lora.rows}" if isinstance(with_lora, Padding) else ""
    return bucket.name + ("_lora" if with_lora else "") + (f"_{with_lora}" if with_extras(with_lora) else "") + padding


def step_shapes(spec: StepSpec, layout: BatchLayout) -> tuple[Any, ...]:
    """Returns `jax.ShapeDtypeStruct`s of the step's arguments, to lower it without arrays or devices."""
    metadata = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    pool, table, state = spec.pool.pool_struct(), spec.pool.table_struct(), spec.state_struct()
    if spec.parallel is not None:
        split = spec.parallel.sharding(POOL)
        pool = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split), pool)
        table, state, metadata = replicated(spec.parallel, (table, state, metadata))
    return spec.params, pool, table, state, metadata


def replicated(parallel: TensorParallel, structs: Any) -> Any:
    """Returns `structs` with a sharding that replicates them on every device."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=parallel.replicated), structs)
