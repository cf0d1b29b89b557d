"""A tiny engine under real traffic, recorded once: a snapshot after every step, and every finished request."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from experiments.pool_picture import serve, tiny_engine
from slora_jax import Engine, RequestOutput
from slora_jax.adapters import AdapterInfo, Tier
from slora_jax.memory import PageKind
from slora_jax.scheduling import FinishReason, RequestMetrics
from slora_jax.serving.observability.snapshot import (
    ADAPTER_ARRIVING,
    ADAPTER_IDLE,
    ADAPTER_IN_USE,
    DUMMY,
    FREE,
    KV,
    PREFIX_IDLE,
    PREFIX_IN_USE,
    EngineSnapshot,
    observe,
    page_kinds,
)


@dataclass
class Moment:
    """State after one step. by_owner: `page_kinds` derived from every owner of pages. loading, used: digests."""

    snapshot: EngineSnapshot
    kinds: np.ndarray
    by_owner: np.ndarray
    tiers: dict[str, Tier]
    loading: set[str]
    used: set[str]
    finished: list[RequestOutput]


@dataclass
class Recording:
    """A recorded run.

    Attributes:
      infos: registered adapters.
      copies: copies of adapters to the device in the engine's trace: bytes, and whether the copy was abandoned.
    """

    infos: list[AdapterInfo]
    moments: list[Moment] = field(default_factory=list)
    copies: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def outputs(self) -> list[RequestOutput]:
        return [output for moment in self.moments for output in moment.finished]


def finished_request(
    adapter: str | None = None, tokens: int = 2, queue: float | None = 0.5, first_token: float = 1.0
) -> RequestOutput:
    """Returns an output with 3 prompt tokens, a token every half second. queue, first_token: seconds after arrival."""
    metrics = RequestMetrics(1.0, None if queue is None else 1.0 + queue, 1.0 + first_token, 9.0)
    times = [1.0 + first_token + n / 2 for n in range(tokens)]
    return RequestOutput("r", adapter, [7] * 3, None, [5] * tokens, FinishReason.LENGTH, metrics, times)


def kinds_by_owner(engine: Engine) -> np.ndarray:
    """Derives `page_kinds` page by page from the requests, the adapters and the prefix cache."""
    kinds = np.full(engine.allocator.num_pages, FREE, np.uint8)
    kinds[0] = DUMMY
    for page in range(1, engine.allocator.num_pages):
        if engine.allocator.kinds[page] == PageKind.PREFIX:
            kinds[page] = PREFIX_IDLE
    for request in engine.scheduler.running:
        for at, page in enumerate(request.pages):
            kinds[page] = PREFIX_IN_USE if at < request.num_shared else KV
    for resident in engine.residency.residents:
        for page in resident.pages:
            kinds[page] = (
                ADAPTER_IN_USE
                if resident.digest in engine.residency.users
                else ADAPTER_IDLE
                if resident.has_landed
                else ADAPTER_ARRIVING
            )
    return kinds


@functools.cache
def recording() -> Recording:
    """Serves 160 requests over 60 adapters on a pool of 300 pages; host memory holds about half of the adapters."""
    settings = {"host_adapter_bytes": 2_000_000, "prefetch": 4, "upload_pages_per_step": 8}
    with tiny_engine(**settings) as engine, engine.trace() as trace:
        made = Recording(engine.adapters())
        for deltas in serve(engine):
            residents = engine.residency.residents
            made.moments.append(
                Moment(
                    observe(engine),
                    page_kinds(engine),
                    kinds_by_owner(engine),
                    engine.store.tiers(),
                    {resident.digest for resident in residents if not resident.has_landed},
                    set(engine.residency.users),
                    [delta.output for delta in deltas if delta.output is not None],
                )
            )
        events = [event["args"] for event in trace.events() if "slot" in event["args"]]
        made.copies = [(event["bytes"], event.get("given_up", False)) for event in events]
        return made
