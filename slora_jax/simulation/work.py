"""Amount of computation in a step, as input of the cost model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slora_jax.scheduling import ScheduledSequence


@dataclass(slots=True)
class StepWork:
    """Sums over the sequences and rows (tokens) of one step.

    Attributes:
      decode_rows: sequences that decode one token.
      decode_context: tokens that they attend to, summed.
      prefill_rows: rows of prompts.
      prefill_pairs: (query, key) pairs of prompts.
      prefill_context: tokens whose keys and values prompts read, summed over prompts.
      prompts: number of prompts.
      longest_prompt: rows of the longest prompt.
      sampled: rows that pass through the output head.
      lora_rows: rows with an adapter.
      row_ranks: sum of adapter ranks over rows.
      sequence_ranks: sum of adapter ranks over sequences.
      segments: runs of consecutive sequences with the same adapter.
      longest_segment: rows of the longest segment.
      adapters: number of distinct adapters.
      adapter_ranks: sum of their ranks.
      max_rank: largest of their ranks.
    """

    decode_rows: int = 0
    decode_context: int = 0
    prefill_rows: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    prompts: int = 0
    longest_prompt: int = 0
    sampled: int = 0
    lora_rows: int = 0
    row_ranks: int = 0
    sequence_ranks: int = 0
    segments: int = 0
    longest_segment: int = 0
    adapters: int = 0
    adapter_ranks: int = 0
    max_rank: int = 0

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def sequences(self) -> int:
        return self.decode_rows + self.prompts


def step_work(sequences: Iterable[ScheduledSequence], ranks: Mapping[str, int]) -> StepWork:
    """Returns the work of a plan's sequences, in order. A single token counts as decoding.

    Args:
      ranks: by adapter digest.
    """
    work = StepWork()
    used: set[str] = set()
    previous: str | None = None
    decode_rows = decode_context = sampled = lora_rows = row_ranks = sequence_ranks = segments = segment = longest = 0
    for sequence in sequences:
        count = sequence.count
        if count == 1:
            decode_rows += 1
            decode_context += sequence.start + 1
        else:
            work.prompts += 1
            work.prefill_rows += count
            work.prefill_context += sequence.start + count
            work.prefill_pairs += count * sequence.start + count * (count + 1) // 2
            work.longest_prompt = max(work.longest_prompt, count)
        sampled += sequence.samples
        adapter = sequence.request.adapter
        if adapter is None:
            previous = None
            continue
        digest = adapter.digest
        if digest != previous:
            segments += 1
            segment = 0
            previous = digest
            used.add(digest)
        segment += count
        if segment > longest:
            longest = segment
        rank = ranks[digest]
        lora_rows += count
        row_ranks += count * rank
        sequence_ranks += rank
    work.decode_rows, work.decode_context, work.sampled = decode_rows, decode_context, sampled
    work.lora_rows, work.row_ranks, work.sequence_ranks = lora_rows, row_ranks, sequence_ranks
    work.segments, work.longest_segment, work.adapters = segments, longest, len(used)
    if used:
        used_ranks = [ranks[digest] for digest in used]
        work.adapter_ranks, work.max_rank = sum(used_ranks), max(used_ranks)
    return work
