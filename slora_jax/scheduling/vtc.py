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
    """Admits the earliest request of the tenant with the least service.

    Service is `input_price` per prompt token, charged at first admission, plus `output_price` per output token, charged
    when sampled, divided by the tenant's weight. Recomputation after a preemption is free. When a tenant returns to the
    queue, its counter is raised to the minimum among waiting tenants (if none waits, to that of the tenant admitted
    last), so that it cannot accumulate credit.

    Fairness (theorem 4.4 of the VTC paper): while two tenants both have waiting requests, their weighted services in
    any interval differ by at most 2 * max(input_price * L, output_price * M) / (the smallest weight), where L is the
    longest prompt, tokens, and M the largest total final length of the requests running at one time, tokens. It assumes
    no preemption (admission "reserve"), adapters in host memory, and input_price <= output_price: an admission puts a
    tenant ahead by at most input_price * L, and each of its tokens by output_price, together at most output_price * M.
    At other prices the bound is 2 * (input_price * L + output_price * M) / (the smallest weight).

    Attributes:
      weights: share of each tenant, positive; 1 for tenants not listed.
      input_price, output_price: service per prompt token and per output token.
      counters: weighted service of each tenant, including raises.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    input_price: float = 1.0
    output_price: float = 2.0
    counters: dict[str, float] = field(default_factory=dict, init=False)
    _last_admitted: str | None = field(default=None, init=False, repr=False)  # tenant of the last admission

    def __post_init__(self) -> None:
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"Vtc.weights[{tenant!r}]={weight!r}: must be a positive number")
        for name in ("input_price", "output_price"):
            price = getattr(self, name)
            if not 0 <= price < math.inf:
                raise ConfigError(f"Vtc.{name}={price!r}: must be a number of at least 0")

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        """Ties go to the tenant whose request arrived first. Costs O(tenants), then O(log tenants) per request."""
        return self._by_service(waiting, self.counters)

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        """Predicts the order by charging each request's prompt when it is yielded."""
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
            floor = 0.0 if self._last_admitted is None else self.counters[self._last_admitted]
        self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)

    def admitted(self, request: Request) -> None:
        self._last_admitted = request.tenant
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
