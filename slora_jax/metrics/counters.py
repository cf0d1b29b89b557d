"""Counters of an engine or a simulation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Counters:
    """Counters of one engine, shared by its pool, scheduler, core and executor.

    Attributes:
      steps: steps dispatched.
      tokens_computed: tokens of the dispatched steps.
      tokens_generated: output tokens read.
      preemptions: preemptions of running requests.
      aborts: requests aborted by the policy before their first token.
      prompt_tokens: tokens of requests at admission: the prompt, and after a preemption the output too.
      prefix_hit_tokens: those of `prompt_tokens` found in the prefix cache; the others are in `tokens_computed`.
      prefix_evictions: pages evicted from the prefix cache.
      adapter_loads: adapters placed in the pool.
      adapter_evictions: adapters evicted from the pool.
      adapter_hits: uses of an adapter that was resident from an earlier use.
      prefetch_hits: prefetched adapters that landed before their first request could have been admitted.
      prefetches_wasted: prefetched adapters that were evicted, or no longer needed by any request, before any use.
      upload_bytes: adapter bytes copied to the device (0 in a simulation).
      adapter_merges: merges of an adapter into the weights.
      disk_reads: adapters read back from disk (simulation only; otherwise see `AdapterStore.stats`).
      host_seconds: CPU time to plan, pack and read steps; modelled in a simulation.
      launch_seconds: CPU time of the calls that dispatch uploads and steps.
      device_seconds: time in which the device computes, without launches, waits and copies (simulation only).
      copy_seconds: time in which the copy lane is busy (simulation only).
      stall_seconds: time in which the device waits for an adapter copy to start a step, or no step can run while a copy
        is in flight (simulation only).
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
