"""Fair share among tenants by virtual token counters (VTC; Sheng et al., arXiv 2401.00588, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from slora_jax.errors import ConfigError
from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request


@dataclass
class Vtc(Policy):
    """Admits the earliest request of the tenant that has been served least.

    Service of a tenant: `input_price` per prompt token, charged on first admission, and `output_price` per output
    token, charged as it is sampled (recomputation after a preemption is free), divided by the tenant's weight. A tenant
    that comes back to the queue is lifted to the least counter there (to that of the last one admitted, if nobody
    waits), so that nobody saves up credit.

    Fairness (theorem 4.4 there): as long as two tenants both have waiting requests, their services (over their weights)
    in any interval differ by at most 2 * max(input_price * L_input, output_price * M), with L_input the longest prompt
    and M the most tokens that the requests running at one time hold at their ends; over the least weight. It assumes
    that nobody is preempted (admission "reserve"), that adapters are in memory, and input_price <= output_price: a
    tenant is at most input_price * L ahead on an admission and gains output_price a token after it, together at most
    output_price * M. At other prices the bound is 2 * (input_price * L_input + output_price * M).

    weights: share of each tenant, above 0; 1 where none is given. counters: service received so far, lifts included.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    input_price: float = 1.0
    output_price: float = 2.0
    counters: dict[str, float] = field(default_factory=dict, init=False)
    _last_left: str | None = field(default=None, init=False, repr=False)  # tenant of the last admission

    def __post_init__(self) -> None:
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"Vtc.weights[{tenant!r}]={weight!r}: must be a positive number")
        for name in ("input_price", "output_price"):
            price = getattr(self, name)
            if not 0 <= price < math.inf:
                raise ConfigError(f"Vtc.{name}={price!r}: must be a number of at least 0")

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        """Ties go to the tenant whose request came first. O(tenants) to begin with, O(log tenants) each."""
        return self._by_service(waiting, self.counters)

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        """As if each one's prompt were charged when it is yielded."""
        counters = {tenant: self.counters[tenant] for tenant in waiting.by_tenant}
        for request in self._by_service(waiting, counters):
            yield request
            if not request.metrics.preemptions:
                counters[request.tenant] += self._price(request.tenant, self.input_price * len(request.prompt))

    def _by_service(self, waiting: RequestQueue, counters: Mapping[str, float]) -> Iterator[Request]:
        groups = {tenant: iter(group) for tenant, group in waiting.by_tenant.items()}
        heads = {tenant: next(group) for tenant, group in groups.items()}
        least = [(counters[tenant], head.number, tenant) for tenant, head in heads.items()]
        heapify(least)
        while least:
            tenant = least[0][2]
            yield heads[tenant]
            following = next(groups[tenant], None)
            if following is None:
                heappop(least)
            else:
                heads[tenant] = following
                heapreplace(least, (counters[tenant], following.number, tenant))

    def arrived(self, request: Request, waiting: RequestQueue) -> None:
        tenant, queued = request.tenant, waiting.by_tenant
        if tenant in queued:
            return
        if queued:
            floor = min(self.counters[other] for other in queued)
        else:
            floor = 0.0 if self._last_left is None else self.counters[self._last_left]
        self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)

    def admitted(self, request: Request) -> None:
        self._last_left = request.tenant
        if not request.metrics.preemptions:
            self._charge(request.tenant, self.input_price * len(request.prompt))

    def stepped(self, sequences: Sequence[ScheduledSequence]) -> None:
        counters, weights, price = self.counters, self.weights, self.output_price
        for sequence in sequences:
            if sequence.samples:
                tenant = sequence.request.tenant
                counters[tenant] += price / weights.get(tenant, 1.0)

    def _charge(self, tenant: str, service: float) -> None:
        self.counters[tenant] += self._price(tenant, service)

    def _price(self, tenant: str, service: float) -> float:
        return service / self.weights.get(tenant, 1.0)
