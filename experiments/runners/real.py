"""A run on this machine: the engine (or PEFT), with the model's own weights or random ones, in real time."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from experiments.config.schema import RunConfig
from experiments.mechanisms.engine import CPU_COPY, CPU_FLOPS
from experiments.runners.figures import run_figures
from experiments.runners.workload import run_workload
from experiments.systems import Packed, System, SystemSettings, WorkloadRequest, settings_of
from experiments.systems.peft import PeftModel
from experiments.workloads import Workload, engine_requests
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
"""Settings of `SystemConfig` that the engine has too: the same ones, and in other units."""

SIMULATED_ONLY = ("disk_reads", "device_seconds", "copy_seconds", "stall_seconds")
"""Counters that a real engine does not have."""

PAPER = {"admission": "reserve", "prefetch": 0, "prefix_cache": False, "eviction": "immediate"}
"""The engine's part of S-LoRA's scheduling, for systems whose name ends in "-paper"."""


WARM_UP_TOKENS = 3
"""Of prompt and of output: less than a page, so that no prefix cache keeps any."""


class RealRunner:
    """Keeps the last system for the next run, if that differs in its requests, adapters and policy only. A run begins
    with no adapter in the pool and a policy that has seen nothing; what has to be compiled was, and has run once."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._system: System | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def run(self, run: RunConfig) -> dict[str, Any]:
        """The figures of a run.

        Raises:
          ConfigError: a setting that only the simulator has. SloraError: the system cannot serve the run.
        """
        work = run_workload(run)
        system = self._prepare(run, work)
        server = system.server
        model = run.model_config()
        requests = engine_requests(work, model.vocab_size, run.seed)
        before = {} if isinstance(server, PeftModel) else _counters(server)
        start = time.perf_counter()
        records = system.run(requests)
        after = {} if isinstance(server, PeftModel) else _counters(server)
        figures = run_figures(records, start, run.slo_seconds, run.dollars_per_hour)
        return figures | {name: after[name] - before[name] for name in after}

    def close(self) -> None:
        if self._system is not None:
            self._system.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._system = self._scratch = self._key = None

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
        if key != self._key or remembers:
            self.close()
            self._system = self._make(run, settings, adapters)
            self._key = key
            self._warm_up(run, adapters)
        assert self._system is not None
        if isinstance(self._system.server, Engine):
            _register(self._system.server, adapters)
            self._system.server.scheduler.policy = _policy(run, settings)
        return self._system

    def _warm_up(self, run: RunConfig, adapters: Mapping[str, _Adapter]) -> None:
        """What a program, a library or a thread pool does only once is done before the first run."""
        assert self._system is not None
        server = self._system.server
        if isinstance(server, Engine):
            _register(server, dict(list(adapters.items())[:1]))
        every = list(adapters) if isinstance(server, Packed) else list(adapters)[:1] or [None]
        vocab_size = run.model_config().vocab_size
        prompts = np.random.default_rng(run.seed).integers(0, vocab_size, (len(every), WARM_UP_TOKENS)).tolist()
        self._system.run(
            [WorkloadRequest(0.0, tuple(p), name, WARM_UP_TOKENS) for p, name in zip(prompts, every, strict=True)]
        )

    def _make(self, run: RunConfig, settings: SystemSettings, adapters: Mapping[str, _Adapter]) -> System:
        model = run.model_config()
        if settings.software == "peft":
            return System(run.system.name, settings, self._peft(run, adapters))
        if run.has_weights:
            graphdef, params, model = load_model(run.model_file, settings.engine.dtype, progress=False)
        else:
            graphdef, params = init_random(model, settings.engine.dtype, run.seed)
        if settings.software == "packed":
            made = {name: adapter.make(int(name)) for name, adapter in adapters.items()}
            return System(run.system.name, settings, Packed(model, graphdef, params, made, settings.engine))
        policy, eviction = _policy(run, settings), _eviction_policy(run, settings)
        engine = Engine(model, graphdef, params, settings.engine, policy=policy, eviction=eviction)
        return System(run.system.name, settings, engine)

    def _peft(self, run: RunConfig, adapters: Mapping[str, _Adapter]) -> PeftModel:
        """The model's checkpoint, or a random one of the same shape, and the same adapters, as PEFT reads them."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._scratch = tempfile.TemporaryDirectory()
        root = Path(self._scratch.name)
        model_dir = run.model_file if run.has_weights else root / "model"
        if not run.has_weights:
            torch.manual_seed(run.seed)
            config = AutoConfig.for_model(**json.loads(run.model_file.read_text()))
            AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
        elif not (model_dir / "config.json").is_file():
            raise ConfigError(f"model={run.model}: PEFT reads Hugging Face directories only")
        directories = {n: write_peft(root / f"adapter-{n}", a.make(int(n))) for n, a in adapters.items()}
        return PeftModel(model_dir, directories, run.engine.dtype)


class _Adapter:
    """An adapter, read or made at random when it is wanted."""

    def __init__(self, model: ModelConfig, page_size: int, rank: int, run: RunConfig) -> None:
        self._geometry, self._rank, self._run = adapter_geometry(model, page_size), rank, run

    def make(self, number: int) -> LoraAdapter:
        if self._run.adapters.path is not None:
            return read_peft(self._run.adapters.directories[number], self._geometry)
        return random_adapter(self._geometry, self._rank, self._run.adapters.targets, seed=self._run.seed + number)


def system_settings(run: RunConfig, max_model_len: int) -> SystemSettings:
    """The engine's settings for a run.

    Raises:
      ConfigError: a setting that only the simulator has, or one that the real system needs.
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
    made = settings_of(name, base)
    return replace(made, split_memory=False) if name == "no-unify-mem" else made


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
    """A new one: policies remember what they have seen.

    Raises:
      ConfigError: merged weights, and a policy that mixes adapters.
    """
    merged = settings.engine.lora == "merge"
    policy = make_policy(**(run.system.policy or {"name": "one_adapter" if merged else "fcfs"}))
    if merged and not isinstance(policy, OneAdapter):
        raise ConfigError(
            f"system.policy={dict(run.system.policy or {})}: merge serves one adapter at a time; leave it out"
        )
    return policy


def _register(server: Engine, adapters: Mapping[str, _Adapter]) -> None:
    """These adapters and no others; none of them is in the pool."""
    for info in server.adapters():
        server.unload_adapter(info.name)
    for name, adapter in adapters.items():
        server.load_adapter(name, adapter.make(int(name)))


def _counters(server: Engine | Packed) -> dict[str, float]:
    """Counters since the server was made."""
    stats = server.stats()
    return {field.name: getattr(stats, field.name) for field in fields(Counters) if field.name not in SIMULATED_ONLY}
