"""What goes into a simulation and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slora_jax.metrics import PoolSample, RequestRecord


@dataclass(frozen=True)
class SimulatedRequest:
    """A request of the workload. arrival: seconds from the start, at least 0. adapter: index into the simulation's
    adapters, None for the base model. It always generates `output_tokens`. tenant: who is charged under fair share; ""
    is its adapter."""

    arrival: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""


@dataclass
class SimulationCounters:
    """Of one run. Seconds are of the virtual clock.

    device_seconds: the device computed (launches, waits and copies excluded). copy_seconds: the copy lane was
    busy. stall_seconds: the device had a step to run, and waited for the copy of an adapter. switches: adapters merged.
    """

    steps: int = 0
    tokens_computed: int = 0
    loads: int = 0
    evictions: int = 0
    hits: int = 0
    preemptions: int = 0
    aborts: int = 0
    switches: int = 0
    disk_reads: int = 0
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    copy_seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(frozen=True)
class SimulationResult:
    """records: one per request, in the order of the workload; ids are "0", "1", ...; adapters' names are their indices
    as text. Requests that the policy gave up have `FinishReason.ABORT`. pool: samples at regular times, of all replicas
    together. seconds: when the last request ended, from the start."""

    records: Sequence[RequestRecord]
    pool: Sequence[PoolSample]
    counters: SimulationCounters
    seconds: float
    abort_reasons: dict[str, str] = field(default_factory=dict)
