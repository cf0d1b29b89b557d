"""A step's metadata, packed on the host and unpacked on the device, compared with a walk over its tokens."""

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.pool_write import NO_PAGE
from slora_jax.engine.batch import (
    DENSE_ROWS,
    SAMPLER_FIELDS,
    BatchLayout,
    Bucket,
    SequenceState,
    StepBatch,
    build_metadata,
    set_table_rows,
    shared_rows,
    unpack,
    unpack_sampling,
)
from slora_jax.memory import Evictor, Lru, PageAllocator, PageKind, PrefixCache
from slora_jax.scheduling import AdapterUse, Request, RequestMetrics, SamplingParams, ScheduledSequence, StepPlan

MAX_SEQS, MAX_PAGES, ADAPTER_SLOTS = 9, 14, 4
MIXED = BatchLayout(
    Bucket(tokens=80, seqs=7, decode=False), page_size=8, max_num_seqs=MAX_SEQS, adapter_slots=ADAPTER_SLOTS
)
SMALL = BatchLayout(Bucket(tokens=11, seqs=5, decode=False), page_size=4, max_num_seqs=MAX_SEQS, adapter_slots=64)
DECODE = BatchLayout(
    Bucket(tokens=8, seqs=8, decode=True), page_size=8, max_num_seqs=MAX_SEQS, adapter_slots=ADAPTER_SLOTS
)
LAYOUTS = {"mixed": MIXED, "small": SMALL, "decode": DECODE}

RANKS = (8, 130, 16, 8)
"""Rank of each adapter; two adapters have the same."""

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.125, 1.0),
    min_p=st.floats(0.0, 1.0, allow_subnormal=False),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)


@st.composite
def plans(draw, layout: BatchLayout) -> StepPlan:
    """Plans of sequences in any phase: first and later chunks of a prompt, decoding with the newest token known to the
    host or only to the device, recomputation after a preemption; with an adapter (often a shared one) or without."""
    bucket, longest = layout.bucket, layout.page_size * MAX_PAGES
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    slots = rng.permutation(MAX_SEQS).tolist()
    adapter_slots = rng.permutation(layout.adapter_slots)[: len(RANKS)].tolist()
    page_ids = (1 + rng.permutation(MAX_SEQS * MAX_PAGES)).tolist()
    plan = StepPlan()
    for number in range(draw(st.integers(1, bucket.seqs), "sequences")):
        room = bucket.tokens - plan.num_tokens
        if not room:
            break
        count = 1 if bucket.decode else min(room, draw(st.one_of(st.just(1), st.integers(1, bucket.tokens)), "count"))
        start = draw(st.integers(0, longest - count), "start")
        unknown = draw(st.booleans(), "newest token is on the device only")
        total = start + count + (0 if unknown else draw(st.integers(0, 3), "tokens beyond"))
        prompt = draw(st.integers(1, max(1, total - unknown)), "prompt")
        known = rng.integers(0, 1000, total - unknown).tolist()
        adapter = draw(st.sampled_from([None, 0, 0, 1, 2, 3]), "adapter")
        use = None if adapter is None else AdapterUse(f"{adapter}", f"{adapter}", np.full(7, RANKS[adapter]), 1)
        request = Request(
            id=f"{number}",
            number=number,
            prompt=known[:prompt],
            params=draw(PARAMS, "params"),
            seed=int(rng.integers(0, 2**32)),
            max_new=100,
            adapter=use,
            metrics=RequestMetrics(0.0),
            output=known[prompt:],
            num_sampled=int(rng.integers(0, 50)),
            num_computed=start + count,
            slot=slots.pop(),
            adapter_slot=-1 if adapter is None else adapter_slots[adapter],
            pages=[page_ids.pop() for _ in range(-(-(start + count) // layout.page_size))],
        )
        plan.sequences.append(ScheduledSequence(request, start, count, samples=draw(st.booleans(), "samples")))
        plan.num_tokens += count
    return plan


@dataclass
class Row:
    """One token of a step, computed from the plan."""

    sequence: ScheduledSequence
    token: int
    position: int
    page: int
    offset: int


class Step:
    """A plan, its metadata, and the batch unpacked on the device over stale sequence state."""

    def __init__(self, plan: StepPlan, layout: BatchLayout) -> None:
        rng = np.random.default_rng(0)
        self.plan, self.layout, self.bucket = plan, layout, layout.bucket
        self.page_table = rng.integers(1, 500, (MAX_SEQS + 1, MAX_PAGES)).astype(np.int32)  # stale
        self.last_token = rng.integers(2000, 3000, MAX_SEQS + 1).astype(np.int32)
        for s in plan.sequences:  # earlier steps wrote the pages of the context
            before = -(-s.start // layout.page_size)
            self.page_table[s.request.slot, :before] = s.request.pages[:before]

        self.metadata, self.sequences = build_metadata(plan, layout)
        self.requests = [s.request for s in self.sequences]
        self.batch, self.state = unpacked(layout)(self.metadata, SequenceState(self.page_table, self.last_token))
        self.rows = [row for s in self.sequences for row in self._rows(s)]

    def _rows(self, sequence: ScheduledSequence) -> list[Row]:
        request, size = sequence.request, self.layout.page_size
        tokens = [*request.prompt, *request.output, int(self.last_token[request.slot])]
        positions = range(sequence.start, sequence.start + sequence.count)
        return [Row(sequence, tokens[p], p, request.pages[p // size], p % size) for p in positions]


@cache
def unpacked(layout: BatchLayout):
    """Returns the compiled unpacking of one layout; its results are on the host."""
    program = jax.jit(partial(unpack, layout=layout))

    def call(metadata: np.ndarray, state: SequenceState) -> tuple[StepBatch, SequenceState]:
        return jax.tree.map(np.asarray, program(metadata, state))

    return call


def check_order_of_sequences(step: Step) -> None:
    """Sequences are grouped by adapter: dense ones first, then by descending rank, those without an adapter last."""
    assert Counter(map(id, step.requests)) == Counter(id(s.request) for s in step.plan.sequences)
    slots = [r.adapter_slot for r in step.requests]
    groups = [slot for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1]]
    assert len(groups) == len(set(groups))
    dense_rows = int(step.batch.lora.dense_rows)
    keys = []
    for request, row in zip(step.requests, np.cumsum([0, *(s.count for s in step.sequences)])[:-1], strict=True):
        rank = 0 if request.adapter is None else request.adapter.rows
        keys.append((row < dense_rows, rank))
    assert keys == sorted(keys, reverse=True)


def check_rows(step: Step) -> None:
    """Every row has its token, position, page and offset; padding rows are written to no page."""
    batch, n = step.batch, len(step.rows)
    assert batch.token.shape == batch.position.shape == batch.page.shape == batch.offset.shape == (step.bucket.tokens,)
    found = list(zip(batch.token, batch.position, batch.page, batch.offset, strict=True))
    assert found[:n] == [(r.token, r.position, r.page, r.offset) for r in step.rows]
    for token, position, page, offset in found[n:]:
        assert (token, position, page, offset) == (0, 0, NO_PAGE, 0)


def check_page_table(step: Step) -> None:
    """The page table holds every page of the plan, and its other entries are unchanged."""
    expected = step.page_table.copy()
    for s in step.sequences:
        expected[s.request.slot, : len(s.request.pages)] = s.request.pages
    np.testing.assert_array_equal(step.state.page_table[:MAX_SEQS], expected[:MAX_SEQS])
    np.testing.assert_array_equal(step.state.last_token, step.last_token)
    for seq, s in enumerate(step.sequences):
        np.testing.assert_array_equal(step.batch.attention.page_table[seq], expected[s.request.slot])


def check_rows_of_sequences(step: Step) -> None:
    """Sequences have their rows and context; padding sequences have no rows and the spare slot."""
    batch, attention, n = step.batch, step.batch.attention, len(step.sequences)
    first = np.cumsum([0, *(s.count for s in step.sequences)])
    assert attention.first_row[:n].tolist() == first[:-1].tolist()
    assert attention.length[:n].tolist() == [s.count for s in step.sequences]
    assert attention.context[:n].tolist() == [s.start for s in step.sequences]
    assert batch.last_row[:n].tolist() == (first[1:] - 1).tolist()
    assert batch.slot[:n].tolist() == [r.slot for r in step.requests]
    assert (batch.slot[n:] == MAX_SEQS).all()  # the spare row, for tokens sampled by padding
    assert not attention.length[n:].any() and not attention.first_row[n:].any() and not attention.context[n:].any()
    assert ((batch.last_row >= 0) & (batch.last_row < step.bucket.tokens)).all()


def check_lora_tiles(step: Step) -> None:
    """LoRA tiles cover each row with an adapter exactly once."""
    lora, bucket = step.batch.lora, step.bucket
    assert (
        lora.num_tiles
        <= len(lora.slot)
        <= -(-bucket.tokens // step.layout.lora_tile_rows) + min(step.layout.adapter_slots, bucket.seqs)
    )
    slot_of_row = [row.sequence.request.adapter_slot for row in step.rows]
    covered = []
    for slot, first, rows in np.stack([lora.slot, lora.first_row, lora.rows], 1)[: lora.num_tiles].tolist():
        assert 1 <= rows <= step.layout.lora_tile_rows
        assert slot_of_row[first : first + rows] == [slot] * rows
        covered += range(first, first + rows)
    with_adapter = [row for row, slot in enumerate(slot_of_row) if slot >= 0]
    assert covered == with_adapter == list(range(int(lora.lora_rows)))
    assert lora.row_slot[with_adapter].tolist() == [slot_of_row[row] for row in with_adapter]
    assert ((lora.row_slot >= 0) & (lora.row_slot < step.layout.adapter_slots)).all()


def check_dense_adapters(step: Step) -> None:
    """Adapters with many rows come first; a decode program has no dense adapters."""
    lora = step.batch.lora
    slots = [row.sequence.request.adapter_slot for row in step.rows]
    dense = [slot >= 0 and slots.count(slot) >= DENSE_ROWS and not step.bucket.decode for slot in slots]
    assert dense == [row < int(lora.dense_rows) for row in range(len(slots))]
    tile_is_dense = np.asarray(lora.first_row)[: int(lora.num_tiles)] < int(lora.dense_rows)
    assert tile_is_dense.tolist() == [tile < int(lora.num_dense) for tile in range(int(lora.num_tiles))]


def check_attention_tiles(step: Step) -> None:
    """Each row is in one prefill tile or is a single row; single rows come by descending context."""
    attention, height = step.batch.attention, step.bucket.prefill_tile_rows
    assert attention.num_prefill <= len(attention.prefill_seq)
    tiles = np.stack([attention.prefill_seq, attention.prefill_row], 1)[: attention.num_prefill].tolist()
    expected = [[i, row] for i, s in enumerate(step.sequences) if s.count > 1 for row in range(0, s.count, height)]
    assert sorted(tiles) == expected
    single = attention.decode_seq[: attention.num_decode].tolist()
    assert sorted(single) == [i for i, s in enumerate(step.sequences) if s.count == 1]
    contexts = [step.sequences[i].start for i in single]
    assert contexts == sorted(contexts, reverse=True)
    assert ((attention.decode_seq >= 0) & (attention.decode_seq < step.bucket.seqs)).all()
    if step.bucket.decode:
        assert attention.prefill_seq.size == 0


def check_sampling_inputs(step: Step) -> None:
    """Each sequence has its own sampling inputs; padding is greedy."""
    seqs, n = step.bucket.seqs, len(step.requests)
    numbers = jnp.asarray(step.metadata[: len(SAMPLER_FIELDS) * seqs])
    slot, target, inputs = jax.tree.map(np.asarray, unpack_sampling(numbers, seqs))
    np.testing.assert_array_equal(slot, step.batch.slot)
    assert (target == -1).all()  # no plan scores its prompt
    assert not inputs.temperature[n:].any()  # padding samples greedily
    assert (inputs.cutoff == np.inf).all()
    for seq, request in enumerate(step.requests):
        params = request.params
        for name in ("temperature", "top_p", "min_p"):
            assert getattr(inputs, name)[seq] == np.float32(getattr(params, name))
        assert inputs.top_k[seq] == params.top_k
        assert inputs.seed[seq] == request.seed and inputs.seed.dtype == np.uint32
        assert inputs.output_index[seq] == request.num_sampled


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(data=st.data())
def test_metadata_of_random_plans_agrees_with_a_walk_over_their_tokens(layout, data):
    step = Step(data.draw(plans(layout), "plan"), layout)
    for check in CHECKS:
        check(step)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fields_are_contiguous_in_the_buffer(layout):
    end = 0
    for offset, length in layout.fields.values():
        assert offset == end
        end += length
    assert end == layout.size


def plan_of(counts: list[int], adapters: list[int], page_size: int) -> StepPlan:
    """Fresh prompts of `counts` tokens with the adapters in slots `adapters` (-1: none)."""
    plan = StepPlan(num_tokens=sum(counts))
    for number, (count, slot) in enumerate(zip(counts, adapters, strict=True)):
        use = None if slot < 0 else AdapterUse(f"{slot}", f"{slot}", np.full(7, 8 + slot), 1)
        request = Request(
            f"{number}", number, [7] * count, SamplingParams(), 0, 9, use, RequestMetrics(0.0), slot=number
        )
        request.adapter_slot = slot
        request.pages = list(range(1 + 20 * number, 1 + 20 * number + -(-count // page_size)))
        plan.sequences.append(ScheduledSequence(request, 0, count, True))
    return plan


def test_a_full_bucket_has_room_for_the_largest_number_of_tiles():
    """Segments of one row more than whole tiles need the most tiles; 32 rows a tile, 2 adapters of 33 rows."""
    step = Step(plan_of([33, 33, 1, 1, 10], [0, 1, -1, -1, -1], 8), MIXED)
    assert int(step.batch.lora.num_tiles) == 4 and int(step.batch.lora.lora_rows) == 66
    step = Step(plan_of([66, 2, 2, 2, 2, 2, 4], [-1] * 7, 8), MIXED)
    assert int(step.batch.lora.num_tiles) == int(step.batch.lora.lora_rows) == 0
    assert int(step.batch.attention.num_prefill) == 8  # 66 rows are two tiles of at most 64


def test_newest_token_comes_from_the_device_until_the_host_has_read_it():
    plan = plan_of([1], [-1], 8)
    request = plan.sequences[0].request
    request.prompt, request.output, request.slot = [5, 6], [9], 3
    request.pages = [11]
    plan.sequences[0].start = 3  # the token after the three that are known
    step = Step(plan, DECODE)
    assert step.batch.token[0] == step.last_token[3] and step.batch.position[0] == 3
    plan.sequences[0].start = 2
    assert Step(plan, DECODE).batch.token[0] == 9


@pytest.mark.parametrize("count", [0, 1, 8, 9])
def test_shared_rows_of_the_page_table_are_written_in_groups_of_eight(count):
    rng = np.random.default_rng(count)
    table = rng.integers(1, 500, (MAX_SEQS + 1, MAX_PAGES)).astype(np.int32)  # stale
    cache = PrefixCache(Evictor(PageAllocator(500), Lru()), 8)
    expected, requests = table.copy(), []
    for slot in rng.permutation(MAX_SEQS)[:count].tolist():
        shared = int(rng.integers(1, MAX_PAGES + 1))
        pages = cache.evictor.allocator.allocate(shared + 2, PageKind.KV).tolist()
        tokens = rng.integers(0, 1000, 8 * shared).astype(np.int32).tobytes()
        request = plan_of([1], [-1], 8).sequences[0].request
        request.slot, request.pages = slot, pages
        request.prefix = cache.extend(None, None, tokens, pages[:shared])
        expected[slot, :shared] = pages[:shared]
        requests.append(request)
    found, calls = jnp.asarray(table), 0
    for slot, rows in shared_rows(requests, found):
        found, calls = set_table_rows(found, slot, rows), calls + 1
    assert calls == -(-count // 8)
    for request in requests:
        n = request.num_shared
        np.testing.assert_array_equal(found[request.slot, :n], expected[request.slot, :n])
    others = sorted(set(range(MAX_SEQS)) - {request.slot for request in requests})
    np.testing.assert_array_equal(found[np.array(others, int)], table[others])
