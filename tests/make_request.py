"""Makes requests of any size for tests without a model."""

import numpy as np

from slora_jax.scheduling import AdapterUse, Request, RequestMetrics, SamplingParams


def make_request(
    number: int,
    arrival: float = 0.0,
    prompt: int | list[int] = 4,
    new: int = 4,
    adapter: str | None = None,
    adapter_pages: int = 1,
    tenant: str = "",
) -> Request:
    use = None if adapter is None else AdapterUse(adapter, adapter, np.ones(7, np.int32), adapter_pages)
    return Request(
        id=str(number),
        number=number,
        prompt=[0] * prompt if isinstance(prompt, int) else prompt,
        params=SamplingParams(),
        seed=0,
        max_new=new,
        adapter=use,
        metrics=RequestMetrics(arrival=arrival),
        tenant=tenant,
    )
