"""The shared engine of the tiny model, the engine that spills five of six adapters, and the greedy reference."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from dense_reference import dense_logits
from tiny_model import TinyModel, one_start_at_a_time

from slora_jax import Engine, RequestOutput, SamplingParams
from slora_jax.adapters import LoraAdapter, random_adapter, write_peft
from slora_jax.memory import PageKind


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    return TinyModel()


@pytest.fixture(scope="session")
def model_dir(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def greedy_margin(tiny: TinyModel) -> Callable[..., float]:
    """Returns a function: how far the reference logits of the chosen tokens lie below the largest ones, relative to the
    largest logit. 0 when every token is the reference's greedy choice."""

    def margin(prompt: list[int], tokens: list[int], adapter: LoraAdapter | None = None) -> float:
        logits = dense_logits(tiny.config, tiny.params, prompt + tokens[:-1], adapter)[len(prompt) - 1 :]
        chosen = logits[np.arange(len(tokens)), tokens]
        return float(((logits.max(-1) - chosen) / np.abs(logits).max()).max())

    return margin


def assert_idle(engine: Engine) -> None:
    """Checks that no request is unfinished, no page leaked, and all adapters and prefixes can be evicted."""
    assert not engine.has_work()
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages.kv) == (0, 0, 0)
    idle = stats.pages.adapter_idle + stats.pages.prefix_idle
    assert stats.pages.free + idle == engine.allocator.capacity


@contextmanager
def squeezed(engine: Engine, pages: int) -> Iterator[None]:
    """Evicts idle pages and leaves the engine `pages` free ones, so that running sequences compete for them."""
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    held = engine.allocator.allocate(engine.allocator.num_free - pages, PageKind.KV)
    yield
    engine.allocator.free(held)


@pytest.fixture(scope="session")
def squeeze() -> Callable:
    return squeezed


@pytest.fixture(scope="session")
def shared_engine(model_dir: Path, tiny: TinyModel) -> Iterator[Engine]:
    with one_start_at_a_time():
        engine = Engine.from_pretrained(model_dir, tiny.settings())
    with engine:
        yield engine


def assert_clean(engine: Engine) -> None:
    """Cancels and unloads what a test left. Checks that nothing remains and that no request was unfinished."""
    engine.step()  # a surplus step may be in flight
    unfinished = engine.has_work()
    for request in list(engine.core.requests):
        engine.cancel(request)
    while engine.has_work():
        engine.step()
    assert_idle(engine)
    for info in engine.adapters():
        assert engine.unload_adapter(info.name)
    if engine.prefixes is not None:
        engine.prefixes.drop(None)
    assert engine.allocator.num_free == engine.allocator.capacity
    store = engine.store.stats()
    assert (store.registered, store.resident_bytes, store.spilled) == (0, 0, 0)
    assert not unfinished, "the test left requests behind"


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine. After the test, no request, adapter or page may be left."""
    yield shared_engine
    assert_clean(shared_engine)


class SixAdapters:
    """Adapters "a" to "f" on an engine whose host memory holds one of them: "f", once all are registered.

    The others are in spill files. `expected` has the greedy tokens of each after `prompt` ("base": the base model) from
    a run without a fault, checked against merged weights.
    """

    names = "abcdef"
    prompt = tuple(range(30, 60))  # two chunks of prefill
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    nbytes = 10240

    def __init__(self, engine: Engine, tiny: TinyModel, spill_dir: Path, greedy_margin: Callable[..., float]) -> None:
        self.engine, self.geometry, self.spill_dir = engine, tiny.geometry, spill_dir
        self.load(self.names)
        self.expected = {name: output.token_ids for name, output in self.serve([*self.names, None]).items()}
        for name, tokens in self.expected.items():
            adapter = None if name == "base" else self.weights(name)
            assert greedy_margin(list(self.prompt), tokens, adapter) < 1e-5
        assert len({tuple(tokens) for tokens in self.expected.values()}) == 7

    def weights(self, name: str) -> LoraAdapter:
        """Returns the adapter of this letter, of `nbytes`."""
        return random_adapter(self.geometry, {"q": 4, "down": 4}, seed=ord(name))

    def load(self, names: Iterable[str], sources: Path | None = None) -> None:
        """Loads adapters from new directories `sources / name`, or from memory."""
        for name in names:
            adapter = self.weights(name)
            info = self.engine.load_adapter(name, write_peft(sources / name, adapter) if sources else adapter)
            assert info.nbytes == self.nbytes

    def digest(self, name: str) -> str:
        return self.weights(name).digest

    def file(self, name: str) -> Path:
        """Returns the spill file of an adapter."""
        (path,) = self.spill_dir.glob(f"*/{self.digest(name)[:16]}*.tiles")
        return path

    def add(self, adapters: Iterable[str | None]) -> dict[str, str]:
        """Adds a request for each. Returns request id -> name ("base" for None)."""
        return {self.engine.add_request(self.prompt, self.params, name): name or "base" for name in adapters}

    def serve(
        self, adapters: Iterable[str | None], fault: Callable[[], object] | None = None, late: Iterable[str | None] = ()
    ) -> dict[str, RequestOutput]:
        """Serves `adapters`; after five steps, calls `fault` and adds requests for `late`. Name -> output."""
        requests, outputs = self.add(adapters), {}
        for step in itertools.count():
            if step == 5:
                if fault is not None:
                    fault()
                requests |= self.add(late)
            if step >= 5 and not self.engine.has_work():
                break
            outputs |= {requests[d.request_id]: d.output for d in self.engine.step() if d.output is not None}
        self.engine.check()
        assert self.engine.stats().pages.kv == 0
        return outputs

    def assert_right(self, outputs: dict[str, RequestOutput], names: Iterable[str]) -> None:
        """Checks that exactly these were served, each with its expected tokens."""
        assert {n: o.token_ids for n, o in outputs.items() if o.finish_reason == "length"} == {
            n: self.expected[n] for n in names
        }


@pytest.fixture(scope="session")
def shared_six(
    tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory, greedy_margin: Callable[..., float]
) -> Iterator[SixAdapters]:
    spill_dir = tmp_path_factory.mktemp("spill")
    with tiny.engine(host_adapter_bytes=SixAdapters.nbytes, spill_dir=spill_dir) as engine:
        yield SixAdapters(engine, tiny, spill_dir, greedy_margin)


@pytest.fixture
def six(shared_six: SixAdapters) -> Iterator[SixAdapters]:
    """Six adapters, none registered yet. After the test, no request, adapter, page or file may be left."""
    assert_clean(shared_six.engine)
    yield shared_six
    assert_clean(shared_six.engine)
    deadline = time.monotonic() + 20  # the store's thread may still be at work
    while (files := [p for p in shared_six.spill_dir.rglob("*") if p.is_file()]) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert files == []
