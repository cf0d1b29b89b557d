"""Simulates the paper's offline loop around Hugging Face PEFT (`run_exp_peft.py`): static batches of one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from slora_jax.errors import ConfigError
from slora_jax.metrics import Counters, RequestRecord
from slora_jax.scheduling import FinishReason
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.request import SimulatedRequest, SimulationResult
from slora_jax.simulation.system import SystemConfig
from slora_jax.simulation.work import StepWork

Arrived = tuple[int, float, SimulatedRequest]
"""Number, arrival time in seconds, and request."""

CACHE_COPIES = 2
"""Copies of the whole KV cache per decode step: one to append the new tokens, one to select the remaining rows."""


def simulate_offline(
    workload: Sequence[SimulatedRequest], system: SystemConfig, cost: CostModel, ranks: Sequence[int]
) -> SimulationResult:
    """Serves the workload in rounds: collects the requests that have arrived, groups them by adapter, wraps the base
    model in each adapter, and runs its group in batches of `system.offline_batch`.

    A batch pads its prompts to the longest, drops rows as they end, and admits no request. Requests that arrive during
    a round wait for the next one.
    """
    if system.offline_batch is None:
        raise ConfigError(f"system {system.name!r}: offline_batch=None; it must be given")
    loop = OfflineLoop(cost, ranks)
    arrivals = Arrivals(workload)
    while arrivals:
        loop.now = max(loop.now, arrivals.next)
        groups: dict[int | None, list[Arrived]] = {}
        for number, time in arrivals.until(loop.now):
            request = workload[number]
            groups.setdefault(request.adapter, []).append((number, time, request))
        for adapter, group in groups.items():
            loop.wrap(adapter)
            for first in range(0, len(group), system.offline_batch):
                batch = group[first : first + system.offline_batch]
                loop.run(batch, adapter)
                for number, _, _ in batch:
                    arrivals.ended(number, loop.records[number].finished)
    records = [loop.records[number] for number in sorted(loop.records)]
    return SimulationResult(records, (), loop.counters, max(record.finished for record in records))


class OfflineLoop:
    """Clock, records and counters of the loop. Host and device do not overlap."""

    def __init__(self, cost: CostModel, ranks: Sequence[int]) -> None:
        self.now = 0.0
        self.records: dict[int, RequestRecord] = {}
        self.counters = Counters()
        self._cost, self._ranks = cost, ranks

    def wrap(self, adapter: int | None) -> None:
        """Wraps the base model in an adapter (`get_peft_model`)."""
        if adapter is not None:
            self.now += self._cost.efficiency.adapter_wrap_seconds
            self.counters.host_seconds += self._cost.efficiency.adapter_wrap_seconds
            self.counters.adapter_loads += 1

    def run(self, batch: Sequence[Arrived], adapter: int | None) -> None:
        """Runs one batch to its last token."""
        rank = 0 if adapter is None else self._ranks[adapter]
        admitted, times = self.now, []
        padded = max(request.prompt_tokens for _, _, request in batch)
        longest = max(request.output_tokens for _, _, request in batch)
        for step in range(longest):
            rows = sum(request.output_tokens > step for _, _, request in batch)
            self._step(_padded_work(rows, padded, step, rank), rows * (padded + step) if step else 0)
            times.append(self.now)
        for number, arrival, request in batch:
            own = tuple(times[: request.output_tokens])
            self.records[number] = RequestRecord(
                request_id=str(number),
                adapter=None if adapter is None else str(adapter),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                finish_reason=FinishReason.LENGTH,
                arrival=arrival,
                finished=own[-1],
                admitted=admitted,
                first_token=own[0],
                token_times=own,
            )

    def _step(self, work: StepWork, cached_tokens: int) -> None:
        cost, counters = self._cost, self.counters
        host = cost.host_seconds(work)
        copies = CACHE_COPIES * cost.move_seconds(cached_tokens * cost.shape.kv_bytes)
        seconds = cost.step_seconds(work) + copies
        self.now += host + seconds
        counters.host_seconds += host
        counters.device_seconds += cost.busy_seconds(work) + copies
        counters.steps += 1
        counters.tokens_computed += work.rows


def _padded_work(rows: int, padded: int, step: int, rank: int) -> StepWork:
    """Work of a step: `rows` prompts of `padded` tokens, all with logits (step 0), or one more token for each row."""
    if step:
        work = StepWork(decode_rows=rows, decode_context=rows * (padded + step), sampled=rows)
    else:
        work = StepWork(
            prefill_rows=rows * padded,
            prefill_pairs=rows * padded * (padded + 1) // 2,
            prefill_context=rows * padded,
            prompts=rows,
            longest_prompt=padded,
            sampled=rows * padded,
        )
    if rank:
        work.lora_rows, work.row_ranks, work.sequence_ranks = work.rows, work.rows * rank, rows * rank
        work.segments, work.longest_segment = 1, work.rows
        work.adapters, work.adapter_ranks, work.max_rank = 1, rank, rank
    return work
