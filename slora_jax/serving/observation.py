"""What an observer sees of an engine: its counters, every page of its pool, every adapter.

The engine is one thread's. That thread calls `observe` and `page_kinds` between steps; both cost microseconds, however
many adapters are registered. All else here works on what they return, and on the store, from any thread.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slora_jax.adapters import AdapterInfo, AdapterStore, StoreStats, Tier
from slora_jax.engine import Engine, EngineStats, RequestOutput
from slora_jax.memory import PageKind, Resident
from slora_jax.metrics import PAGE_KINDS as POOL_KINDS

PAGE_KINDS = (*POOL_KINDS, "dummy")
"""Contents of a page: those of `PoolPages`, and page 0, which absorbs padding."""

FREE, KV, PREFIX_IN_USE, PREFIX_IDLE, ADAPTER_IN_USE, ADAPTER_IDLE, ADAPTER_ARRIVING, DUMMY = range(8)

State = Literal["disk", "host", "loading", "device", "pinned"]
STATES: tuple[State, ...] = ("disk", "host", "loading", "device", "pinned")
"""States of an adapter: spilled; in host memory; on its way to the device; in the pool and idle; in the pool and in use
by a running request."""

_OBSERVED_AS = np.zeros(len(PageKind), np.uint8)  # by `PageKind`, of pages that no running request is known to use
_OBSERVED_AS[[PageKind.FREE, PageKind.KV, PageKind.PREFIX, PageKind.ADAPTER, PageKind.DUMMY]] = (
    *(FREE, KV, PREFIX_IDLE, ADAPTER_IDLE, DUMMY),
)


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine at one moment. time: seconds of `time.monotonic`. pages: of the pool, by `PAGE_KINDS`. device: state of
    the adapters in the pool, by digest; any other is on "host" or "disk"."""

    time: float
    stats: EngineStats
    store: StoreStats
    pages: Mapping[str, int]
    device: Mapping[str, State]

    def states(self, tiers: Mapping[str, Tier]) -> dict[State, int]:
        """Contents of adapters by state. tiers: of `AdapterStore.tiers`."""
        counts: Counter[State] = Counter(self.device.values())
        counts.update(tier for digest, tier in tiers.items() if digest not in self.device)
        return {state: counts[state] for state in STATES}


def observe(engine: Engine) -> EngineSnapshot:
    """The engine now. For its own thread, between steps."""
    stats, residency = engine.stats(), engine.residency
    device: dict[str, State] = dict.fromkeys(residency.digests, "device")
    device.update(dict.fromkeys(residency.arriving, "loading"))
    device.update((resident.digest, "pinned") for resident in _in_use(engine))
    pages = vars(stats.pages) | {"dummy": 1}
    return EngineSnapshot(time.monotonic(), stats, engine.store.stats(), pages, device)


def page_kinds(engine: Engine) -> np.ndarray:
    """What each page holds now: indices into `PAGE_KINDS`, uint8 `[num_pages]`. For the engine's thread."""
    kinds = _OBSERVED_AS[engine.allocator.kinds]
    if engine.prefixes is not None:
        kinds[np.frombuffer(engine.prefixes.in_use, bool)] = PREFIX_IN_USE
    for residents, kind in ((_in_use(engine), ADAPTER_IN_USE), (engine.residency.arriving.values(), ADAPTER_ARRIVING)):
        if residents:
            kinds[np.concatenate([resident.pages for resident in residents])] = kind
    return kinds


def _in_use(engine: Engine) -> list[Resident]:
    """Adapters that running requests use: at most `max_num_seqs`, however many are resident."""
    found = (engine.residency.find(digest) for digest in engine.residency.users)
    return [resident for resident in found if resident is not None]


@dataclass(frozen=True)
class Usage:
    """What an adapter's finished requests came to. last_used: unix seconds. queued: of the requests, those that were
    admitted; queue_seconds: what these waited in all; last_queue_seconds: the last of them."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    last_used: float | None = None
    queued: int = 0
    queue_seconds: float = 0.0
    last_queue_seconds: float | None = None

    def plus(self, output: RequestOutput, now: float) -> Usage:
        """With one more request, finished at `now`."""
        queue = queue_seconds(output)
        return Usage(
            self.requests + 1,
            self.prompt_tokens + len(output.prompt_token_ids),
            self.generated_tokens + len(output.token_ids),
            now,
            self.queued + (queue is not None),
            self.queue_seconds + (queue or 0.0),
            self.last_queue_seconds if queue is None else queue,
        )


NO_USAGE = Usage()


class AdapterUsage:
    """Usage by adapter name, from finished requests. One thread calls it, the event loop's.

    Knows registered names only: one that is unloaded is forgotten, and what finishes for it later is not recorded.
    """

    def __init__(self, is_registered: Callable[[str], bool]) -> None:
        """is_registered: `AdapterStore.has`."""
        self._is_registered = is_registered
        self._by_name: dict[str, Usage] = {}

    def finished(self, output: RequestOutput) -> None:
        name = output.adapter
        if name is not None and self._is_registered(name):
            self._by_name[name] = self.of(name).plus(output, time.time())

    def forget(self, name: str) -> None:
        """The name was unloaded."""
        self._by_name.pop(name, None)

    def of(self, name: str) -> Usage:
        return self._by_name.get(name, NO_USAGE)

    def __len__(self) -> int:
        return len(self._by_name)


@dataclass(frozen=True)
class AdapterState:
    """A registered adapter, where it is, and what it was used for. nbytes: in host memory. aliases: other names of the
    same content."""

    name: str
    digest: str
    rank: int
    num_pages: int
    nbytes: int
    state: State
    usage: Usage
    aliases: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """An entry of `/v1/adapters`. Times in seconds; `last_used` is unix time, null if it never was."""
        usage = self.usage
        return {
            "name": self.name,
            "digest": self.digest,
            "aliases": list(self.aliases),
            "rank": self.rank,
            "pages": self.num_pages,
            "bytes": self.nbytes,
            "state": self.state,
            "last_used": usage.last_used,
            "requests": usage.requests,
            "prompt_tokens": usage.prompt_tokens,
            "generated_tokens": usage.generated_tokens,
            "queue_seconds_mean": usage.queue_seconds / usage.queued if usage.queued else None,
            "queue_seconds_last": usage.last_queue_seconds,
        }


def adapter_states(store: AdapterStore, device: Mapping[str, State], usage: AdapterUsage) -> list[AdapterState]:
    """Every registered adapter, the one used last first, never used ones at the end in order of registration. For the
    event loop's thread. device: of the newest `EngineSnapshot`."""
    tiers, infos = store.tiers(), store.infos()
    names: defaultdict[str, list[str]] = defaultdict(list)
    for info in infos:
        names[info.digest].append(info.name)
    states = [_state(info, tiers, device, usage.of(info.name), names[info.digest]) for info in infos]
    states.sort(key=lambda state: state.usage.last_used or 0.0, reverse=True)
    return states


def queue_seconds(output: RequestOutput) -> float | None:
    """How long a request waited to be admitted; None if it never was."""
    metrics = output.metrics
    return None if metrics.admitted is None else metrics.admitted - metrics.arrival


def _state(
    info: AdapterInfo, tiers: Mapping[str, Tier], device: Mapping[str, State], usage: Usage, names: Sequence[str]
) -> AdapterState:
    state = device.get(info.digest) or tiers.get(info.digest, "disk")
    aliases = tuple(name for name in names if name != info.name)
    return AdapterState(info.name, info.digest, info.rank, info.num_pages, info.nbytes, state, usage, aliases)
