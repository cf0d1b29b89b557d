"""Five hundred adapters, a tenth of them in host memory and about ten in the pool: nothing leaks, nothing compiles, and
tokens are those of merged weights, under reloads, unloads, cancellations and preemptions."""

import gc
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax import AdapterError, Engine, RequestOutput, SamplingParams
from slora_jax.adapters import AdapterTiles, BaseGeometry, LoraAdapter, random_adapter

NUM_ADAPTERS = 500
HOST_BYTES = 1 << 20
"""About a tenth of the adapters; the others are spilled."""
RANKS = (1, 2, 3, 4, 5, 8, 11, 16)
SAMPLE = 80  # outputs compared with merged weights


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    with tiny.engine(host_adapter_bytes=HOST_BYTES) as engine:
        yield engine


def tiles_in_memory() -> int:
    """Bytes of all adapter tiles in this process, whatever the store counts."""
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is AdapterTiles)


class Churn:
    """Drives the engine, and records the weights of each name and those that each request must be served with.

    An adapter is identified by the seed of its weights; no two loads share one. When a read from disk ends depends on
    the machine. Draws that follow from it come from `late`, so that those from `rng` are the same in every run.
    """

    def __init__(self, engine: Engine, geometry: BaseGeometry, rng: np.random.Generator) -> None:
        self.engine, self.geometry, self.rng = engine, geometry, rng
        (self.late,) = rng.spawn(1)
        self.seeds = itertools.count()
        self.weights: dict[str, int] = {}  # name -> seed
        self.expected: dict[str, int | None] = {}  # request -> seed, None for the base model
        self.greedy: set[str] = set()
        self.outputs: dict[str, RequestOutput] = {}
        self.cancelled = self.most_resident = 0

    def adapter(self, seed: int) -> LoraAdapter:
        rng = np.random.default_rng(seed)
        targets = rng.choice(PROJECTIONS, rng.integers(1, 5), replace=False).tolist()
        return random_adapter(self.geometry, {p: int(rng.choice(RANKS)) for p in targets}, seed=seed)

    def load(self, name: str) -> None:
        """Registers new weights under a name."""
        self.weights[name] = next(self.seeds)
        self.engine.load_adapter(name, self.adapter(self.weights[name]))

    def unload(self, name: str) -> None:
        del self.weights[name]
        self.engine.unload_adapter(name)

    def arrive(self, name: str | None) -> None:
        rng = self.late
        greedy = rng.random() < 0.7
        params = SamplingParams(
            max_tokens=int(rng.choice([1, 3, 20])),
            temperature=0.0 if greedy else 0.9,
            stop_token_ids=rng.integers(2, 320, 6).tolist(),
        )
        prompt = rng.integers(2, 320, rng.choice([1, 2, 7, 8, 9, 45])).tolist()
        self.ask(prompt, params, name)

    def ask(self, prompt: list[int], params: SamplingParams, name: str | None) -> str:
        request = self.engine.add_request(prompt, params, name)
        self.expected[request] = None if name is None else self.weights[name]
        if params.temperature == 0:
            self.greedy.add(request)
        return request

    def cancel_any(self) -> None:
        """Cancels an unfinished request; a new one, if there is none."""
        unfinished = sorted(self.engine.core.requests)
        request = self.late.choice(unfinished) if unfinished else self.ask([5, 6], SamplingParams(), None)
        assert self.engine.cancel(request)
        self.cancelled += 1

    def step(self) -> None:
        for delta in self.engine.step():
            if delta.output is not None:
                assert delta.request_id not in self.outputs
                self.outputs[delta.request_id] = delta.output
        self.most_resident = max(self.most_resident, len(self.engine.residency))

    def drain(self) -> None:
        while self.engine.has_work():
            self.step()
        self.engine.check()

    def collide(self, squeeze: Callable) -> list[str]:
        """Runs four requests that grow to 11 pages each and two with small adapters on 26 pages: some are preempted."""
        params = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
        small = [info.name for info in self.engine.adapters() if info.num_pages <= 8]
        requests = []
        with squeeze(self.engine, 26):
            for name in [None, None, None, None, *small[:2]]:
                requests.append(self.ask(self.late.integers(2, 320, 8).tolist(), params, name))
            while self.engine.has_work():
                self.step()
        self.engine.check()
        return requests

    def run(self, names: list[str]) -> None:
        """Adds requests for every name in random order and bursts, between reloads, unloads and cancellations."""
        rng = self.rng
        unused = rng.permutation(names).tolist()
        while unused:
            for _ in range(min(len(unused), rng.poisson(3))):
                self.arrive(unused.pop() if rng.random() < 0.9 else None)
            event = rng.random()
            if event < 0.05 and self.engine.scheduler.running:
                use = self.engine.scheduler.running[-1].adapter
                if use is not None and use.name in self.weights:
                    self.load(use.name)  # requests with the old weights are running
                    self.arrive(use.name)
            elif event < 0.10:
                name = str(rng.choice(list(self.weights)))
                if name not in unused:
                    self.unload(name)
            elif event < 0.15:
                self.cancel_any()
            elif event < 0.16:
                self.drain()
            self.step()
        self.drain()


def test_five_hundred_adapters_churn_through_a_small_pool(
    tiny, engine, greedy_margin, compilations, squeeze, rng
) -> None:
    others = tiles_in_memory()
    churn = Churn(engine, tiny.geometry, rng)
    names = [f"adapter-{i}" for i in range(NUM_ADAPTERS)]
    for name in names[:2]:
        churn.load(name)
    engine.generate([[1], [2]], SamplingParams(max_tokens=2, temperature=1.0), [names[0], None])

    compilations.clear()  # warm from here on
    for name in names[2:]:
        churn.load(name)
        assert engine.store.stats().resident_bytes <= HOST_BYTES
    assert tiles_in_memory() - others <= HOST_BYTES
    assert engine.store.stats().spilled > 0.8 * NUM_ADAPTERS
    churn.run(names)
    collided = churn.collide(squeeze)
    assert not compilations, f"{len(compilations)} programs were compiled after warm-up"
    jax.jit(lambda x: x * 3 + 1)(jnp.zeros(5))
    assert compilations, "the counter does not count"

    assert churn.outputs.keys() == churn.expected.keys()
    reasons = [output.finish_reason for output in churn.outputs.values()]
    assert reasons.count("cancelled") == churn.cancelled > 5
    assert reasons.count("stop") > 10 and "error" not in reasons
    stats = engine.stats()
    assert 6 < churn.most_resident < 30, churn.most_resident
    assert stats.adapter_loads > 0.9 * NUM_ADAPTERS and stats.adapter_evictions > 0.9 * NUM_ADAPTERS
    assert stats.preemptions > 0 and any(churn.outputs[request].metrics.preemptions for request in collided)
    assert engine.store.stats().spill_reads > 0.5 * NUM_ADAPTERS
    with pytest.raises(AdapterError, match="unknown adapter 'adapter-12345'; did you mean 'adapter-"):
        engine.add_request([1], None, "adapter-12345")

    checkable = [r for r, output in churn.outputs.items() if output.token_ids and r in churn.greedy]
    for request in [*rng.choice(checkable, SAMPLE, replace=False), *collided]:
        seed, output = churn.expected[request], churn.outputs[request]
        adapter = None if seed is None else churn.adapter(seed)
        assert greedy_margin(output.prompt_token_ids, output.token_ids, adapter) < 1e-5, request

    for name in list(churn.weights):
        churn.unload(name)
    assert engine.prefixes is not None
    engine.prefixes.drop(None)  # of the base model; the others were dropped with their adapters
    assert engine.allocator.num_free == engine.allocator.capacity
    assert len(engine.residency) == 0
    store = engine.store.stats()
    assert (store.registered, store.resident_bytes, store.spilled) == (0, 0, 0)
