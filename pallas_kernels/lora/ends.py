"""LoRA on the output head and on the token embedding. All backends use these XLA operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_format import weights_at
from pallas_kernels.lora import xla
from pallas_kernels.lora.layout import LoraLayout
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EndRows:
    """Addresses of the head's matrices for each sequence, and of the embedding's for each row.

    Attributes:
      num_seqs: int32, sequences with an adapter. They come first.
    """

    head: xla.StackRows
    embed: xla.StackRows
    num_seqs: jax.Array


def prepare(
    layout: LoraLayout, table: AdapterTable, tiles: LoraTiles, last_row: jax.Array, length: jax.Array, max_rank: int
) -> EndRows:
    """Locates the matrices of a step, once.

    Args:
      last_row, length: int32 `[S]`, last row and number of rows of each sequence; 0 rows for padding.
    """
    num_seqs = jnp.sum((length > 0) & (last_row < tiles.lora_rows))
    slot = tiles.row_slot[last_row]
    return EndRows(
        xla.prepare_end(layout, "head", table.pages, table.ranks, slot, num_seqs, max_rank),
        xla.prepare_end(layout, "embed", table.pages, table.ranks, tiles.row_slot, tiles.lora_rows, max_rank),
        num_seqs,
    )


def add_head(
    hidden: jax.Array, logits: jax.Array, pool: Sequence[jax.Array], layout: LoraLayout, rows: EndRows
) -> jax.Array:
    """Returns `logits [S, vocab]`, float32, plus the head's LoRA product of `hidden [S, d]`; `pool` has all layers."""
    nothing = jnp.zeros((hidden.shape[0], layout.vocabulary_columns), jnp.float32)
    head = layout.ends[0]
    parts = [
        xla.add_rows(hidden, nothing, layer, head, layout, rows.head, jnp.zeros_like(rows.num_seqs), rows.num_seqs)
        for layer in pool
    ]
    return logits + jnp.concatenate(parts, axis=1)[:, : logits.shape[1]]


def add_embedding(
    tokens: jax.Array, x: jax.Array, pool: Sequence[jax.Array], layout: LoraLayout, rows: EndRows
) -> jax.Array:
    """Returns the embeddings `x [T, d]` of `tokens` int32 `[T]` plus their LoRA product; `pool` has all layers."""
    width, embed, addresses = layout.width, layout.ends[1], rows.embed
    flat = [layer.reshape(-1, width) for layer in pool]
    layer_of, within = tokens // layout.vocabulary_columns, tokens % layout.vocabulary_columns
    chunk, column = within // width, within % width

    def group(g: jax.Array, delta: jax.Array) -> jax.Array:
        a_row = jnp.take_along_axis(addresses.a_row[g, :, 0], chunk[:, None, None], axis=2)[..., 0]  # [T, GROUP]
        h = jnp.zeros(a_row.shape, jnp.float32)
        for index, layer in enumerate(flat):
            h = jnp.where((layer_of == index)[:, None], weights_at(layer, a_row, column[:, None]), h)
        b_row, live = addresses.b_row[g], addresses.b_live[g]  # [T, chunks, GROUP]
        h = lax.optimization_barrier(jnp.where(live, h[:, None], 0.0))
        return delta + sum(h[..., j, None] * weights_at(flat[0], b_row[..., j], **xla.CLIP) for j in range(xla.GROUP))

    old = xla.split_outputs(x.astype(jnp.float32), embed, layout)
    new = lax.fori_loop(0, jnp.max(addresses.groups), group, old)
    return jnp.where((addresses.groups > 0)[:, None], xla.join_outputs(new, embed, layout).astype(x.dtype), x)
