"""The step's metadata: packed on the host into one small int32 buffer, unpacked on the device.

The rows of a step are the tokens of its sequences, contiguous by sequence. Sequences are ordered by adapter, so that an
adapter's rows are contiguous too: adapters with many rows first (dense), then the other adapters, each by descending
rank, then rows without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora import LoraTiles
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention import AttentionTiles
from pallas_kernels.pool_write import NO_PAGE
from slora_jax.engine.config import Bucket
from slora_jax.engine.sampling import SamplingInputs
from slora_jax.scheduling import Request, ScheduledSequence, StepPlan

DENSE_ROWS = 8
"""Minimum number of rows of an adapter for a matrix product instead of products row by row."""


@dataclass(frozen=True)
class SequenceState:
    """State of running sequences on the device, by sequence slot. The last slot is for padding.

    Attributes:
      page_table: page ids, int32 `[max_num_seqs + 1, max_pages]`.
      last_token: newest sampled token, int32 `[max_num_seqs + 1]`; the next step reads it before the host does.
    """

    page_table: jax.Array
    last_token: jax.Array


jax.tree_util.register_dataclass(SequenceState, data_fields=["page_table", "last_token"], meta_fields=[])


TABLE_ROWS = 8
"""Page-table rows written by one call of `set_table_rows`."""


@partial(jax.jit, donate_argnums=0)
def set_table_rows(page_table: jax.Array, slot: jax.Array, pages: jax.Array) -> jax.Array:
    """Writes rows `pages [TABLE_ROWS, max_pages]` of sequences `slot [TABLE_ROWS]` to the page table, which is donated.

    Used for requests that start with cached pages, more than a step's metadata holds.
    """
    return page_table.at[slot].set(pages)


def shared_rows(requests: Sequence[Request], page_table: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `slot` and `pages` for the calls of `set_table_rows` that write the requests' shared pages."""
    padding, max_pages = page_table.shape[0] - 1, page_table.shape[1]
    for first in range(0, len(requests), TABLE_ROWS):
        slot, pages = np.full(TABLE_ROWS, padding, np.int32), np.zeros((TABLE_ROWS, max_pages), np.int32)
        for row, request in enumerate(requests[first : first + TABLE_ROWS]):
            slot[row], pages[row, : request.num_shared] = request.slot, request.pages[: request.num_shared]
        yield slot, pages


SAMPLER_FIELDS = ("slot", "target", "temperature", "top_k", "top_p", "min_p", "seed", "output_index", "cutoff")
"""Metadata fields of the programs after the step, one number per sequence each, at the start of the buffer. "target" is
the prompt token to score, or -1 to score the sampled token. "cutoff" is infinity unless `with_cutoff` set it."""

_SAMPLER_FLOATS = ("temperature", "top_p", "min_p", "cutoff")


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a bucket's metadata buffer."""

    bucket: Bucket
    page_size: int
    max_num_seqs: int
    adapter_slots: int
    lora_tile_rows: int = 32  # maximum rows of a LoRA tile

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """(offset, length) of each field in the int32 buffer, by name."""
        bucket = self.bucket
        tokens, seqs = bucket.tokens, bucket.seqs
        deltas = ceil_div(tokens, self.page_size) + seqs
        lora_tiles = ceil_div(tokens, self.lora_tile_rows) + min(self.adapter_slots, seqs)
        prefill_tiles = 0 if bucket.decode else ceil_div(tokens, bucket.prefill_tile_rows) + seqs
        lengths = dict.fromkeys(SAMPLER_FIELDS, seqs) | {"token": tokens}
        lengths |= dict.fromkeys(("first_row", "length", "context", "adapter_slot", "decode_seq"), seqs)
        lengths |= dict.fromkeys(("delta_slot", "delta_column", "delta_page"), deltas)
        lengths |= dict.fromkeys(("lora_slot", "lora_row", "lora_rows_of"), lora_tiles)
        lengths |= dict.fromkeys(("prefill_seq", "prefill_row"), prefill_tiles)
        lengths |= dict.fromkeys(
            ("num_rows", "num_lora_tiles", "num_dense", "dense_rows", "lora_rows", "num_prefill", "num_decode"), 1
        )
        fields, offset = {}, 0
        for name, length in lengths.items():
            fields[name] = (offset, length)
            offset += length
        return fields

    @cached_property
    def size(self) -> int:
        return sum(length for _, length in self.fields.values())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The unpacked metadata that the model and the kernels read, for T rows and S sequences.

    Attributes:
      token: token ids, int32 `[T]`.
      position: position of each token in its sequence, int32 `[T]`.
      page, offset: page id (`NO_PAGE` for padding), and row in the page, of each token's KV, int32 `[T]`. No two live
        rows have the same place.
      slot: sequence slots, int32 `[S]`.
      last_row: row whose hidden state yields each sequence's next token, int32 `[S]`.
    """

    token: jax.Array
    position: jax.Array
    page: jax.Array
    offset: jax.Array
    slot: jax.Array
    last_row: jax.Array
    attention: AttentionTiles
    lora: LoraTiles


def build_metadata(plan: StepPlan, layout: BatchLayout) -> tuple[np.ndarray, list[ScheduledSequence]]:
    """Packs a plan into a bucket's buffer, int32 `[layout.size]`. Also returns the sequences in batch order, with one
    sequence per scored token."""
    buffer = np.zeros(layout.size, np.int32)
    view = {name: buffer[offset : offset + length] for name, (offset, length) in layout.fields.items()}
    for name in _SAMPLER_FLOATS:
        view[name] = view[name].view(np.float32)

    planned = [one for s in plan.sequences for one in _split_scored(s)] if plan.extra else plan.sequences
    count = np.array([s.count for s in planned], np.int32)
    adapter = np.array([s.adapter_slot for s in planned], np.int32)
    rank = np.array([0 if s.request.adapter is None else s.request.adapter.rows for s in planned], np.int32)
    dense = (np.bincount(adapter + 1, count)[adapter + 1] >= DENSE_ROWS) & (not layout.bucket.decode)
    order = np.lexsort((adapter, -rank, ~dense, adapter < 0))

    sequences = [planned[i] for i in order]
    requests = [s.request for s in sequences]
    n = len(sequences)
    count, adapter = count[order], adapter[order]
    first_row = np.cumsum(count) - count
    context = np.array([s.start for s in sequences], np.int32)

    view["slot"][:] = layout.max_num_seqs  # the padding slot
    view["slot"][:n] = [r.slot for r in requests]
    view["first_row"][:n], view["length"][:n], view["context"][:n] = first_row, count, context
    view["adapter_slot"][:n] = np.maximum(adapter, 0)
    view["num_rows"][0] = plan.num_tokens
    _put_tokens(view, sequences, first_row)
    _put_page_deltas(view, sequences, layout)
    _put_sampling(view, sequences)
    _put_lora_tiles(view, count, adapter, dense[order], layout.lora_tile_rows)

    decode = np.flatnonzero(count == 1)
    decode = decode[np.argsort(-context[decode], kind="stable")]
    view["decode_seq"][: decode.size], view["num_decode"][0] = decode, decode.size
    prefill = np.flatnonzero(count > 1)
    tile_seq, tile_row = _cut(count[prefill], layout.bucket.prefill_tile_rows)
    view["num_prefill"][0] = tile_seq.size
    view["prefill_seq"][: tile_seq.size], view["prefill_row"][: tile_seq.size] = prefill[tile_seq], tile_row
    return buffer, sequences


def _split_scored(sequence: ScheduledSequence) -> list[ScheduledSequence]:
    if sequence.start >= sequence.request.num_scored:
        return [sequence]
    return [ScheduledSequence(sequence.request, sequence.start + i, 1, False) for i in range(sequence.count)]


def _cut(lengths: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts segments into tiles of at most `rows` rows. Returns each tile's segment and its first row in it."""
    tiles = ceil_div(lengths, rows)
    segment = np.repeat(np.arange(lengths.size), tiles)
    row = (np.arange(segment.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * rows
    return segment, row


def _put_tokens(view: dict[str, np.ndarray], sequences: list, first_row: np.ndarray) -> None:
    """Writes token ids, or `-1 - slot` for a newest token that only the device knows yet."""
    tokens = view["token"]
    for sequence, row in zip(sequences, first_row.tolist(), strict=True):
        request, start, count = sequence.request, sequence.start, sequence.count
        known = len(request.prompt) + len(request.output) - start
        if known < count:  # at most one token is unknown: the newest
            tokens[row + count - 1] = -1 - request.slot
            count = known
        if count:
            tokens[row : row + count] = request.tokens(start, count)


def _put_page_deltas(view: dict[str, np.ndarray], sequences: list, layout: BatchLayout) -> None:
    """Writes page-table entries of pages that this step writes first; `shared_rows` has written the shared ones."""
    size, at = layout.page_size, 0
    slot, column, page = view["delta_slot"], view["delta_column"], view["delta_page"]
    for sequence in sequences:
        request = sequence.request
        first, end = -(-sequence.start // size), -(-(sequence.start + sequence.count) // size)
        if first == end:
            continue
        count = end - first
        slot[at : at + count] = request.slot
        column[at : at + count] = np.arange(first, end)
        page[at : at + count] = request.pages[first:end]
        at += count
    slot[at:] = layout.max_num_seqs  # the padding slot


def _put_sampling(view: dict[str, np.ndarray], sequences: list[ScheduledSequence]) -> None:
    n = len(sequences)
    requests = [s.request for s in sequences]
    params = [r.params for r in requests]
    view["target"][:] = -1
    if any(p.prompt_logprobs is not None for p in params):
        view["target"][:n] = [_target(s) for s in sequences]
    view["temperature"][:n] = [p.temperature for p in params]
    view["top_k"][:n] = [p.top_k for p in params]
    view["top_p"][:n] = [p.top_p for p in params]
    view["min_p"][:n] = [p.min_p for p in params]
    view["seed"][:n] = np.array([r.seed for r in requests], np.uint32).view(np.int32)
    view["output_index"][:n] = [r.num_sampled for r in requests]
    view["cutoff"][:] = np.inf


def _target(sequence: ScheduledSequence) -> int:
    request, start = sequence.request, sequence.start
    return request.prompt[start + 1] if start < request.num_scored else -1


def _put_lora_tiles(
    view: dict[str, np.ndarray], count: np.ndarray, adapter: np.ndarray, dense: np.ndarray, tile_rows: int
) -> None:
    """Writes the exact list of tiles over each adapter's rows, dense adapters first."""
    with_lora = adapter >= 0
    count, adapter, dense = count[with_lora], adapter[with_lora], dense[with_lora]
    if not count.size:
        return
    starts = np.flatnonzero(np.diff(adapter, prepend=-1))  # sequences that begin an adapter's segment
    rows = np.add.reduceat(count, starts)
    first = np.cumsum(rows) - rows
    segment, row = _cut(rows, tile_rows)
    n = segment.size
    view["lora_slot"][:n] = adapter[starts][segment]
    view["lora_row"][:n] = first[segment] + row
    view["lora_rows_of"][:n] = np.minimum(rows[segment] - row, tile_rows)
    view["num_lora_tiles"][0] = n
    view["num_dense"][0] = ceil_div(rows[dense[starts]], tile_rows).sum()
    view["dense_rows"][0] = rows[dense[starts]].sum()
    view["lora_rows"][0] = rows.sum()


def unpack(buffer: jax.Array, state: SequenceState, layout: BatchLayout) -> tuple[StepBatch, SequenceState]:
    """Unpacks the metadata on the device and applies its page-table changes. Returns the batch and the new state."""
    field = {name: buffer[offset : offset + length] for name, (offset, length) in layout.fields.items()}
    tokens = layout.bucket.tokens
    page_table = state.page_table.at[field["delta_slot"], field["delta_column"]].set(field["delta_page"], mode="drop")

    row = jnp.arange(tokens)
    # Padding sequences have first_row 0 and length 0: count the sequences that start at or before each row.
    started = (field["first_row"][None, :] <= row[:, None]) & (field["length"] > 0)[None, :]  # [T, S]
    seq = jnp.maximum(started.sum(1) - 1, 0)
    live = row < field["num_rows"][0]
    position = jnp.where(live, field["context"][seq] + row - field["first_row"][seq], 0)
    slot = jnp.where(live, field["slot"][seq], layout.max_num_seqs)
    page = jnp.where(live, page_table[slot, position // layout.page_size], NO_PAGE)
    token = jnp.where(field["token"] < 0, state.last_token[-1 - field["token"]], field["token"])

    batch = StepBatch(
        token=token,
        position=position,
        page=page,
        offset=position % layout.page_size,
        slot=field["slot"],
        last_row=jnp.maximum(field["first_row"] + field["length"] - 1, 0),
        attention=AttentionTiles(
            page_table=page_table[field["slot"]],
            first_row=field["first_row"],
            length=field["length"],
            context=field["context"],
            prefill_seq=field["prefill_seq"],
            prefill_row=field["prefill_row"],
            num_prefill=field["num_prefill"][0],
            decode_seq=field["decode_seq"],
            num_decode=field["num_decode"][0],
        ),
        lora=LoraTiles(
            slot=field["lora_slot"],
            first_row=field["lora_row"],
            rows=field["lora_rows_of"],
            row_slot=field["adapter_slot"][seq],
            num_tiles=field["num_lora_tiles"][0],
            num_dense=field["num_dense"][0],
            dense_rows=field["dense_rows"][0],
            lora_rows=field["lora_rows"][0],
        ),
    )
    return batch, SequenceState(page_table=page_table, last_token=state.last_token)


def unpack_sampling(buffer: jax.Array, seqs: int) -> tuple[jax.Array, jax.Array, SamplingInputs]:
    """Unpacks the sampler's metadata on the device.

    Args:
      buffer: the first `len(SAMPLER_FIELDS) * seqs` numbers of a step's metadata, int32.

    Returns:
      Sequence slots and targets, int32 `[seqs]` each, and the sampler's inputs.
    """
    field = dict(zip(SAMPLER_FIELDS, buffer.reshape(len(SAMPLER_FIELDS), seqs), strict=True))
    floats = {name: jax.lax.bitcast_convert_type(field[name], jnp.float32) for name in _SAMPLER_FLOATS}
    seed = field.pop("seed").astype(jnp.uint32)
    slot, target = field.pop("slot"), field.pop("target")
    return slot, target, SamplingInputs(**(field | floats), seed=seed)


def with_cutoff(buffer: jax.Array, cutoff: jax.Array) -> jax.Array:
    """Returns the sampler's metadata, as in `unpack_sampling`, with its last field, "cutoff", set."""
    bits = jax.lax.bitcast_convert_type(cutoff, jnp.int32)
    return jnp.concatenate([buffer[: -bits.size], bits])
