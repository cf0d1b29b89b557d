"""The systems of the comparison: the same tokens from all, and each one's own rule."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import REAL_RUN, REPLICAS_TOKENS, SMALL, TinyModel

from experiments.config import make_experiment
from experiments.runners import RealRunner
from experiments.runners.workload import run_workload
from experiments.systems import (
    SYSTEMS,
    OutOfMemory,
    Packed,
    System,
    SystemSettings,
    peft,
    settings_of,
)
from experiments.systems.packed import pages_per_replica
from experiments.systems.peft import PeftModel, serve_by_sweeps, sweep
from experiments.workloads import WorkloadRequest
from slora_jax import ConfigError, EngineConfig, RequestError
from slora_jax.adapters import random_adapter, read_peft, write_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig, load_model

ADAPTERS = {"0": 4, "1": 16, "2": 3}
SETTINGS = SystemSettings(
    engine=EngineConfig(dtype="float32", page_size=8, progress=False, **SMALL),  # type: ignore[arg-type]
    peft_batch=4,
)


@dataclass(frozen=True)
class Checkpoint:
    """A base model and its adapters on disk."""

    model_dir: Path
    adapters: dict[str, Path]

    def make(self, name: str) -> System:
        """Makes a system as the runner does, with `SETTINGS`."""
        memory = {
            "no-unify-mem": {"num_tokens": 50 * 8, "adapter_tokens": 30 * 8},
            "packed": {"num_tokens": REPLICAS_TOKENS},
        }
        run = make_experiment("x", {
            "mode": "real", "model": str(self.model_dir), "adapters": str(self.adapters["0"].parent),
            "workload": {"kind": "batch"}, "engine": REAL_RUN["engine"],
            "system": {"name": name, **REAL_RUN["system"], **memory.get(name, {})},
        }).runs[0].config  # fmt: skip
        return RealRunner()._prepare(run, run_workload(run))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    root = tmp_path_factory.mktemp("systems")
    tiny = TinyModel()
    (root / "model").mkdir()
    tiny.save(root / "model")
    targets = ("q", "k", "v", "o", "down")
    adapters = {
        name: write_peft(root / "adapters" / name, random_adapter(tiny.geometry, rank, targets, seed=rank))
        for name, rank in ADAPTERS.items()
    }
    return Checkpoint(root / "model", adapters)


def workload(count: int = 9, seconds: float = 0.2) -> list[WorkloadRequest]:
    """Requests over the three adapters in random order, of different lengths."""
    rng = np.random.default_rng(0)
    return [
        WorkloadRequest(
            arrival, tuple(rng.integers(3, 320, rng.integers(2, 40)).tolist()), str(rng.choice(list(ADAPTERS))),
            int(rng.integers(1, 12)),
        )
        for arrival in np.sort(rng.random(count) * seconds).tolist()
    ]  # fmt: skip


def in_a_loop(requests: list[WorkloadRequest], users: int, think: float) -> list[WorkloadRequest]:
    """Each user sends every `users`-th of them."""
    return [
        replace(r, arrival=0.0 if i < users else think, after=None if i < users else i - users)
        for i, r in enumerate(requests)
    ]


@pytest.fixture(scope="module")
def slora(checkpoint) -> Iterator[System]:
    with checkpoint.make("slora") as system:
        yield system


@pytest.fixture(scope="module")
def expected(slora) -> list[list[int]]:
    return slora.run_with_tokens(workload()).tokens


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in ("slora", "base")])
def test_every_system_gives_the_same_tokens(checkpoint, expected, name):
    requests = workload()
    with checkpoint.make(name) as system:
        run = system.run_with_tokens(requests)
        assert run.tokens == expected
        for number, (record, request) in enumerate(zip(run.records, requests, strict=True)):
            assert (record.request_id, record.adapter, record.finish_reason) == (f"{number}", request.adapter, "length")
            assert (record.prompt_tokens, record.output_tokens) == (len(request.prompt), request.output)
            assert record.arrival <= record.admitted <= record.first_token <= record.finished
            assert len(record.token_times) == request.output
            gap = record.arrival - run.records[0].arrival
            assert gap == pytest.approx(request.arrival - requests[0].arrival, abs=1e-6)
        closed = system.run_with_tokens(in_a_loop(requests, 2, 0.01))
        assert closed.tokens == expected
        for before, record in zip(closed.records, closed.records[2:], strict=False):
            assert record.arrival == pytest.approx(before.finished + 0.01, abs=1e-6)


@pytest.mark.parametrize(("users", "think"), [(1, 0.0), (3, 0.02), (9, 0.0)])
def test_the_users_of_a_loop_send_when_they_have_their_answers(slora, expected, users, think):
    run = slora.run_with_tokens(in_a_loop(workload(), users, think))
    assert run.tokens == expected
    start = run.records[0].arrival
    assert [record.arrival for record in run.records[:users]] == [start] * users
    for before, record in zip(run.records, run.records[users:], strict=False):
        assert record.arrival == pytest.approx(before.finished + think, abs=1e-6)
        assert record.admitted >= record.arrival - 1e-6
    changes = sorted([(r.arrival + 1e-6, 1) for r in run.records] + [(r.finished, -1) for r in run.records])
    assert max(np.cumsum([change for _, change in changes])) <= users


def test_base_answers_for_every_adapter_without_lora(checkpoint, expected):
    requests = workload()
    with checkpoint.make("base") as base:
        run = base.run_with_tokens(requests)
        for_base = base.run_with_tokens([replace(request, adapter=None) for request in requests])
    assert run.tokens == for_base.tokens != expected
    assert [record.adapter for record in run.records] == [request.adapter for request in requests]


def test_peft_serves_the_base_model_too(checkpoint, slora):
    requests = [replace(r, adapter=None if i % 2 else r.adapter) for i, r in enumerate(workload(6, 0))]
    wanted = slora.run_with_tokens(requests).tokens
    for name in ("peft", "peft-mixed"):
        assert checkpoint.make(name).run_with_tokens(requests).tokens == wanted, name


def test_an_interruption_leaves_the_engine_idle_and_usable(slora, expected, monkeypatch):
    from experiments.systems import system

    class Bar:
        def __init__(self, **_: object) -> None:
            self.n = 0

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self) -> None:
            self.n += 1
            if self.n == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(system, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt):
            slora.run(workload())
    assert not slora.server.has_work()
    slora.server.check()
    assert slora.run_with_tokens(workload()).tokens == expected


# Settings


def test_each_system_changes_one_thing():
    for name in SYSTEMS:
        settings = settings_of(name, SETTINGS)
        changed = [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(SETTINGS, f.name)]
        both = asdict(settings.engine), asdict(SETTINGS.engine)
        engine = [field for field in both[0] if both[0][field] != both[1][field]]
        assert len(changed) <= (2 if name == "peft-mixed" else 1) and len(engine) <= 1, (name, changed, engine)
    distinct = len({repr(settings_of(name, SETTINGS)) for name in SYSTEMS})
    assert distinct == len(SYSTEMS) - 1  # no-unify-mem: its run sets `adapter_pages`


def test_an_unknown_system_and_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"system 'packd' is unknown \(did you mean 'packed'\?\)"):
        settings_of("packd", SETTINGS)
    with pytest.raises(ConfigError, match="SystemSettings.software='vllm'"):
        SystemSettings(software="vllm")
    with pytest.raises(ConfigError, match="SystemSettings.peft_batch=0"):
        SystemSettings(peft_batch=0)


# Packed


def test_the_replicas_share_the_memory_of_the_one_engine(checkpoint):
    """By hand: 2 layers of 32 x (64 + 32 + 96) + 48 x 32 weights, 2 x 320 x 32 embeddings, norms 5 x 32, in float32;
    a page is 2 layers x 2 x 8 x 16 x 4 bytes."""
    model = ModelConfig.from_directory(checkpoint.model_dir)
    weights = 4 * (2 * (32 * (64 + 32 + 96) + 48 * 32) + 2 * 320 * 32 + 5 * 32)
    page = 2 * 2 * 8 * 16 * 4
    config = replace(SETTINGS.engine, num_pages=1 + REPLICAS_TOKENS // 8)
    assert pages_per_replica(model, config, 1) == config.num_pages
    for replicas in (2, 3):
        share = (weights + config.num_pages * page) / replicas
        assert pages_per_replica(model, config, replicas) == int((share - weights) // page)
    with pytest.raises(OutOfMemory, match=r"6 replicas.*leave each 5 pages.*max_model_len=96 .*needs 13"):
        pages_per_replica(model, config, 6)


def test_packed_routes_by_adapter_and_counts_over_its_replicas(checkpoint, slora):
    graphdef, params, model = load_model(checkpoint.model_dir, "float32", progress=False)
    settings = replace(SETTINGS.engine, num_pages=1 + REPLICAS_TOKENS // 8)
    with pytest.raises(ConfigError, match="packed: adapters="):
        Packed(model, graphdef, params, {}, settings)
    geometry = adapter_geometry(model, settings.page_size)
    adapters = {None: None} | {name: read_peft(checkpoint.adapters[name], geometry) for name in "01"}
    packed = Packed(model, graphdef, params, adapters, settings)
    names = [None, "0", "1"]
    requests = [replace(r, adapter=names[i % 3]) for i, r in enumerate(workload(6, 0))]
    wanted = slora.run_with_tokens(requests)
    got = System("packed", SETTINGS, packed).run_with_tokens(requests)
    assert got.tokens == wanted.tokens
    assert [r.adapter for r in got.records] == [r.adapter for r in wanted.records]
    stats = packed.stats()
    assert stats.tokens_generated == sum(request.output for request in requests)
    free = stats.pages.free + stats.pages.prefix_idle
    assert free == sum(engine.allocator.capacity for engine in packed.replicas.values())
    with pytest.raises(RequestError, match="adapter='2' has no replica; there are None, '0', '1'"):
        packed.add_request([1], None, "2")
    packed.add_request([1], None, "0", "x")
    with pytest.raises(RequestError, match="request_id='x' is in use"):
        packed.add_request([1], None, None, "x")
    assert packed.cancel("x") and not packed.cancel("y")
    packed.close()


# PEFT's loop


@pytest.mark.parametrize("mixed", [False, True])
def test_a_sweep_is_the_arrived_in_order_cut_at_changes_of_adapter_and_full_batches(mixed, rng):
    for _ in range(200):
        names = rng.choice(list("abcd"), rng.integers(1, 30)).tolist()
        requests = [WorkloadRequest(0.0, (1,), name, 1) for name in names]
        arrived = np.flatnonzero(rng.random(len(names)) < 0.7).tolist()
        most = int(rng.integers(1, 6))
        heard = [names[i] for i in arrived]
        order = arrived if mixed else sorted(arrived, key=lambda i: (heard.index(names[i]), i))
        batches: list[list[int]] = []
        for i in order:
            joins = batches and len(batches[-1]) < most and (mixed or names[batches[-1][0]] == names[i])
            batches[-1].append(i) if joins else batches.append([i])
        assert sweep(arrived, requests, most, mixed) == batches


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_joins_a_sweep_that_runs(monkeypatch, rng, mixed):
    """On a virtual clock on which every step takes a second, against the rule in a few lines."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += 1.0  # whole seconds, as all times here

    class OneSecondSteps:
        def decode(self, prompts, outputs, adapters):
            for made in range(max(outputs)):
                clock[0] += 1.0
                yield {row: 7 for row, output in enumerate(outputs) if output > made}

    monkeypatch.setattr(peft, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    for _ in range(20):
        arrivals = np.sort(rng.integers(0, 60, 25)).astype(float).tolist()
        load = [WorkloadRequest(t, (1,), str(rng.choice(list("abc"))), int(rng.integers(1, 9))) for t in arrivals]
        clock[0] = 0.0
        run = serve_by_sweeps(OneSecondSteps(), load, 4, mixed, lambda: None)

        now, waiting, times = 0.0, list(range(len(load))), {}
        while waiting:
            arrived = [i for i in waiting if load[i].arrival <= now]
            waiting = [i for i in waiting if i not in arrived]
            now += not arrived
            for batch in sweep(arrived, load, 4, mixed):
                times |= {i: (now + 1, now + load[i].output) for i in batch}
                now += max(load[i].output for i in batch)
        assert [(r.first_token, r.finished) for r in run.records] == [times[i] for i in range(len(load))]
        assert [len(tokens) for tokens in run.tokens] == [request.output for request in load]

        users, think = int(rng.integers(1, 8)), float(rng.integers(0, 9))
        clock[0] = 100.0
        run = serve_by_sweeps(OneSecondSteps(), in_a_loop(load, users, think), 4, mixed, lambda: None)
        for before, record in zip(run.records, run.records[users:], strict=False):
            assert record.arrival == before.finished + think
        arrivals = [record.arrival for record in run.records]
        as_they_came = sorted(range(len(load)), key=lambda i: (arrivals[i], i))
        opened = [replace(load[i], arrival=arrivals[i] - 100.0) for i in as_they_came]
        clock[0] = 100.0
        again = serve_by_sweeps(OneSecondSteps(), opened, 4, mixed, lambda: None)
        assert [r.token_times for r in again.records] == [run.records[i].token_times for i in as_they_came]


def test_without_torch_peft_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs torch: make install EXTRAS=parity"):
        PeftModel(checkpoint.model_dir, checkpoint.adapters)
