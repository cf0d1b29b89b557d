"""Counters of an engine or a simulation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Counters:
    """One object for one engine: pool, scheduler, core and executor each count in their own fields.

    Attributes:
      steps: steps dispatched. tokens_computed: their rows. tokens_generated: output tokens read.
      preemptions: running requests that lost their pages. aborts: requests that the policy ended before their first
        token.
      prompt_tokens: tokens known of requests when they were admitted (their prompts; after a preemption, their output
        too). prefix_hit_tokens: those of them that the prefix cache had; the others are among `tokens_computed`.
      prefix_evictions: pages evicted from the prefix cache.
      adapter_loads: adapters that were given pages in the pool. adapter_evictions: adapters that left it.
        adapter_hits: uses that found their adapter still there from an earlier use.
      prefetch_hits: prefetched adapters that had landed when their first request came to its turn. prefetches_wasted:
        prefetched adapters that were evicted, or that no request wanted any more, before any use.
      upload_bytes: bytes of adapters copied to the device (not counted in a simulation).
      adapter_merges: times that an adapter was merged into the weights.
      disk_reads: adapters read back from disk (simulation only; see `AdapterStore.stats`).
      host_seconds: CPU time to plan, pack and read steps; in a simulation, modelled. launch_seconds: CPU time of the
        calls that give uploads and steps to the device.
      device_seconds: the device computed (launches, waits and copies excluded). copy_seconds: the copy lane was busy.
        stall_seconds: the device had a step to run and waited for the copy of an adapter; or none could run while a
        copy was in flight. These three: simulation only.
    """

    steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
    aborts: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evictions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_hits: int = 0
    prefetch_hits: int = 0
    prefetches_wasted: int = 0
    upload_bytes: int = 0
    adapter_merges: int = 0
    disk_reads: int = 0
    host_seconds: float = 0.0
    launch_seconds: float = 0.0
    device_seconds: float = 0.0
    copy_seconds: float = 0.0
    stall_seconds: float = 0.0
