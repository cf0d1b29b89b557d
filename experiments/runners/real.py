"""Runs on this machine, in real time: the engine or PEFT, with the model's own weights or random ones."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from experiments.config.schema import RunConfig
from experiments.rounds import Outcome
from experiments.runners.figures import latencies, run_figures
from experiments.runners.workload import round_seed, run_workload
from experiments.slow_disk import slow_disk
from experiments.systems import Packed, System, SystemSettings, settings_of
from experiments.systems.peft import PeftModel, write_random_checkpoint
from experiments.workloads import Workload, WorkloadRequest, engine_requests
from slora_jax import ConfigError, Engine, EngineConfig
from slora_jax.adapters import LoraAdapter, random_adapter, read_peft, write_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.memory import CostAware, EvictionPolicy, Immediate, Lru, RestoreCosts
from slora_jax.metrics import Counters
from slora_jax.models import ModelConfig, init_random, load_model
from slora_jax.scheduling import CoreConfig, OneAdapter, Policy, make_policy
from slora_jax.simulation import ModelShape

SHARED = tuple(field.name for field in fields(CoreConfig))
CONVERTED = ("num_tokens", "adapter_tokens", "eviction")
"""Settings of `SystemConfig` that the engine also has: unchanged, and in other units."""

SIMULATED_ONLY = ("disk_reads", "device_seconds", "copy_seconds", "stall_seconds")
"""Counters that a real engine does not have."""

PAPER = {"admission": "reserve", "prefetch": 0, "prefix_cache": False, "eviction": "immediate"}
"""The engine's part of S-LoRA's scheduling, for systems whose name ends in "-paper"."""

CPU_FLOPS, CPU_COPY = 2e10, 4e9
"""Assumed of a CPU under `CostAware`: operations, and bytes copied to the pool, per second."""

WARM_UP_TOKENS = 3
"""Of prompt and of output: less than a page, so that the prefix cache keeps none of them."""


class RealRunner:
    """Keeps the last system for the next run if that differs in its requests, adapters and policy only. A run begins
    with no adapter in the pool and a new policy; every program is compiled and has run once.

    Runs that are measured side by side (`experiments.rounds`) keep all their systems, with their pools as the run
    before left them, and the adapters that they share.
    """

    def __init__(self, beside: Sequence[RunConfig] = ()) -> None:
        """beside: the runs that are measured side by side."""
        self._keeps = bool(beside)
        self._with_peft = any(run.system.name.startswith("peft") for run in beside)
        self._systems: dict[str, System] = {}
        self._registered: dict[str, dict[str, object]] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def run(self, run: RunConfig) -> dict[str, Any]:
        """Returns the figures of a run.

        Raises:
          ConfigError: a setting is the simulator's only. SloraError: the system cannot serve the run.
        """
        return dict(self.measure(run).metrics)

    def measure(self, run: RunConfig, round_number: int = 0) -> Outcome:
        """Returns the figures and tokens of one round of a run. Raises as `run`."""
        work = run_workload(run, round_number)
        system = self._prepare(run, work)
        server = system.server
        requests = engine_requests(work, run.model_config().vocab_size, round_seed(run, round_number))
        before = {} if isinstance(server, PeftModel) else _counters(server)
        with nullcontext() if run.measured is None else slow_disk(run.measured.disk_seconds):
            start = time.perf_counter()
            ran = system.run_with_tokens(requests)
        after = {} if isinstance(server, PeftModel) else _counters(server)
        figures = run_figures(ran.records, start, run.slo_seconds, run.dollars_per_hour)
        figures |= {name: after[name] - before[name] for name in after}
        if run.measured is not None:
            figures |= {"most_running": ran.most_running} | latencies("", ran.records)
            for group, (first, last) in run.measured.groups.items():
                names = {f"{number}" for number in range(first, last)}
                figures |= latencies(f"{group}_", [record for record in ran.records if record.adapter in names])
        return Outcome(figures, ran.tokens)

    def check(self) -> None:
        """Checks the page ownership of every engine. Raises PoolError on a leak."""
        for system in self._systems.values():
            if isinstance(system.server, Engine):
                system.server.check()

    def close(self) -> None:
        for system in self._systems.values():
            system.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._systems, self._registered, self._scratch = {}, {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, run: RunConfig, work: Workload) -> System:
        longest = int((work.prompt_tokens + work.output_tokens).max())
        settings = system_settings(run, max_model_len=run.engine.max_model_len or -(-longest // 128) * 128)
        model = run.model_config()
        adapters = {f"{i}": _Adapter(model, settings.engine.page_size, rank, run) for i, rank in enumerate(work.ranks)}
        engine = settings.software == "engine"
        if run.system.policy is not None and not engine:
            raise ConfigError(f"system.policy={dict(run.system.policy)}: {run.system.name} has none; leave it out")
        made_of = "" if engine else (work.ranks, run.adapters.targets, run.adapters.path)
        key = json.dumps([str(settings), _eviction(run), run.model, run.seed, made_of], default=repr)
        remembers = settings.engine.prefix_cache or _eviction(run) == "cost_aware"
        if key not in self._systems or (remembers and not self._keeps):
            if not self._keeps:
                self.close()
            self._systems[key] = self._make(run, settings, adapters)
            self._warm_up(self._systems[key], run, adapters)
        system = self._systems[key]
        if isinstance(system.server, Engine):
            registered = self._registered.setdefault(key, {}) if self._keeps else {}
            _register(system.server, adapters, registered)
            system.server.scheduler.policy = _policy(run, settings)
        return system

    def _warm_up(self, system: System, run: RunConfig, adapters: Mapping[str, _Adapter]) -> None:
        """Does what a program, a library or a thread pool does only once."""
        server = system.server
        if isinstance(server, Engine):
            _register(server, dict(list(adapters.items())[:1]), {})
        every = list(adapters) if isinstance(server, Packed) else list(adapters)[:1] or [None]
        vocab_size = run.model_config().vocab_size
        prompts = np.random.default_rng(run.seed).integers(0, vocab_size, (len(every), WARM_UP_TOKENS)).tolist()
        system.run(
            [WorkloadRequest(0.0, tuple(p), name, WARM_UP_TOKENS) for p, name in zip(prompts, every, strict=True)]
        )

    def _make(self, run: RunConfig, settings: SystemSettings, adapters: Mapping[str, _Adapter]) -> System:
        model = run.model_config()
        if settings.software == "peft":
            return System(run.system.name, settings, self._peft(run, adapters))
        if run.has_weights or self._with_peft:
            checkpoint = self._checkpoint(run)
            model = settings.engine.of_model(ModelConfig.from_directory(checkpoint))
            graphdef, params, model = load_model(checkpoint, settings.engine.dtype, progress=False, config=model)
        else:
            model = settings.engine.of_model(model)
            graphdef, params = init_random(model, settings.engine.dtype, run.seed)
        if settings.software == "packed":
            made = {name: adapter.make(int(name)) for name, adapter in adapters.items()}
            return System(run.system.name, settings, Packed(model, graphdef, params, made, settings.engine))
        policy, eviction = _policy(run, settings), _eviction_policy(run, settings)
        engine = Engine(model, graphdef, params, settings.engine, policy=policy, eviction=eviction)
        return System(run.system.name, settings, engine)

    def _peft(self, run: RunConfig, adapters: Mapping[str, _Adapter]) -> PeftModel:
        """Loads the same checkpoint and adapters with PEFT."""
        model_dir = self._checkpoint(run)
        if not (model_dir / "config.json").is_file():
            raise ConfigError(f"model={run.model}: PEFT reads Hugging Face directories only")
        with tempfile.TemporaryDirectory() as scratch:
            directories = {n: write_peft(Path(scratch) / n, a.make(int(n))) for n, a in adapters.items()}
            return PeftModel(model_dir, directories, run.engine.dtype)

    def _checkpoint(self, run: RunConfig) -> Path:
        """Returns the model's own checkpoint, or a random one of its shape."""
        if run.has_weights:
            return run.model_file
        self._scratch = self._scratch or tempfile.TemporaryDirectory()
        directory = Path(self._scratch.name) / f"{run.model_file.stem}-{run.seed}"
        return directory if directory.is_dir() else write_random_checkpoint(run.model_file, directory, run.seed)


class _Adapter:
    """An adapter, read or made at random when it is registered."""

    def __init__(self, model: ModelConfig, page_size: int, rank: int, run: RunConfig) -> None:
        self._geometry, self._rank, self._run = adapter_geometry(model, page_size), rank, run
        self.identity = (rank, run.adapters.targets, run.adapters.path, run.seed)

    def make(self, number: int) -> LoraAdapter:
        if self._run.adapters.path is not None:
            return read_peft(self._run.adapters.directories[number], self._geometry)
        return random_adapter(self._geometry, self._rank, self._run.adapters.targets, seed=self._run.seed + number)


def system_settings(run: RunConfig, max_model_len: int) -> SystemSettings:
    """Returns the engine's settings for a run.

    Raises:
      ConfigError: a setting is the simulator's only, or one that the real system needs is missing.
    """
    name = run.system.name.removesuffix("-paper")
    settings = dict(PAPER if run.system.name.endswith("-paper") else {}) | dict(run.system.settings)
    for setting in settings:
        if setting not in (*SHARED, *CONVERTED):
            raise ConfigError(
                f"system.{setting}: is of the simulator only; leave it out, or use mode=simulated. The engine has "
                f"{', '.join((*SHARED, *CONVERTED))}"
            )
    if settings.get("num_tokens") is None:
        raise ConfigError("system.num_tokens: must be given in real mode")
    page_size = settings.get("page_size", EngineConfig.page_size)
    adapter_tokens = settings.get("adapter_tokens") or 0
    if name == "no-unify-mem" and not adapter_tokens:
        raise ConfigError("system.adapter_tokens: must be given for no-unify-mem in real mode")
    shared = {key: value for key, value in settings.items() if key not in CONVERTED}
    if shared.get("host_adapter_bytes", 0) is None:  # no limit, in a simulation
        del shared["host_adapter_bytes"]
    pages = (settings["num_tokens"] + adapter_tokens) // page_size
    engine = EngineConfig(
        **shared,
        dtype=run.engine.dtype,
        kernels=run.engine.kernels,
        num_pages=pages + 1,
        adapter_pages=adapter_tokens // page_size or None,
        max_model_len=max_model_len,
        max_lora_rank=max(run.adapters.ranks),
        decode_buckets=run.engine.decode_buckets,
        mixed_buckets=run.engine.mixed_buckets,
        progress=False,
    )
    base = SystemSettings(engine=engine, peft_batch=run.engine.batch)
    return settings_of(name, base)


def _eviction(run: RunConfig) -> str:
    default = str(PAPER["eviction"]) if run.system.name.endswith("-paper") else "lru"
    return str(run.system.settings.get("eviction", default))


def _eviction_policy(run: RunConfig, settings: SystemSettings) -> EvictionPolicy:
    if _eviction(run) != "cost_aware":
        return {"lru": Lru, "immediate": Immediate}[_eviction(run)]()
    dtype_bytes = 4 if settings.engine.dtype == "float32" else 2
    shape, page_size = ModelShape.of(run.model_config(), dtype_bytes=dtype_bytes), settings.engine.page_size
    return CostAware(RestoreCosts.of(shape.params, page_size, page_size * shape.kv_bytes, CPU_FLOPS, CPU_COPY))


def _policy(run: RunConfig, settings: SystemSettings) -> Policy:
    """Makes a new policy: policies keep state.

    Raises:
      ConfigError: the weights are merged, and the policy mixes adapters.
    """
    merged = settings.engine.lora == "merge"
    policy = make_policy(**(run.system.policy or {"name": "one_adapter" if merged else "fcfs"}))
    if merged and not isinstance(policy, OneAdapter):
        raise ConfigError(
            f"system.policy={dict(run.system.policy or {})}: merge serves one adapter at a time; leave it out"
        )
    return policy


def _register(server: Engine, adapters: Mapping[str, _Adapter], registered: dict[str, object]) -> None:
    """Registers the adapters that are not among `registered` (name -> identity), which it updates. If that is empty,
    the engine first unloads all adapters, so that none is in the pool."""
    if not registered:
        for info in server.adapters():
            server.unload_adapter(info.name)
    for name, adapter in adapters.items():
        if registered.get(name) != adapter.identity:
            if name in registered:
                server.unload_adapter(name)
            server.load_adapter(name, adapter.make(int(name)))
            registered[name] = adapter.identity


def _counters(server: Engine | Packed) -> dict[str, float]:
    """Returns the counters since the server was made."""
    stats = server.stats()
    return {field.name: getattr(stats, field.name) for field in fields(Counters) if field.name not in SIMULATED_ONLY}
