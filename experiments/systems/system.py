"""A system of the comparison, ready to serve workloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from experiments.systems.packed import Packed
from experiments.systems.peft import PeftModel, serve_by_sweeps
from experiments.systems.serving import Run, serve
from experiments.systems.settings import SystemSettings, settings_of
from experiments.workloads.requests import WorkloadRequest
from slora_jax import ConfigError, Engine, EngineConfig
from slora_jax.engine.sizing import pool_shape
from slora_jax.metrics import RequestRecord
from slora_jax.models import ModelConfig
from slora_jax.scheduling import make_policy


class System:
    """A system that is compiled and loaded; `run` may be called any number of times."""

    def __init__(self, name: str, settings: SystemSettings, server: Engine | Packed | PeftModel) -> None:
        self.name = name
        self.settings = settings
        self.server = server

    def run(self, workload: Sequence[WorkloadRequest]) -> list[RequestRecord]:
        """Serves a workload in real time and returns the record of each request, in order. Ctrl-C stops it, leaves the
        system idle, and is raised again."""
        return self.run_with_tokens(workload).records

    def run_with_tokens(self, workload: Sequence[WorkloadRequest]) -> Run:
        """Serves a workload as `run`; also returns the tokens."""
        progress = self.settings.engine.progress
        with tqdm(total=len(workload), desc=self.name, unit="req", disable=not progress) as bar:
            if isinstance(self.server, PeftModel):
                return serve_by_sweeps(
                    self.server, workload, self.settings.peft_batch, self.settings.peft_mixed, bar.update
                )
            return serve(self.server, workload, bar.update)

    def close(self) -> None:
        if not isinstance(self.server, PeftModel):
            self.server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_system(name: str, model_dir: str | Path, adapters: Mapping[str, Path], settings: SystemSettings) -> System:
    """Makes a system by its name in `SYSTEMS`, over a Hugging Face checkpoint and PEFT directories by name. All but
    "packed" also serve requests for the base model.

    Raises:
      ConfigError: the system is unknown, the settings do not fit together, or PEFT is not installed.
      OutOfMemory: the replicas of "packed" do not fit.
    """
    model_dir = Path(model_dir)
    settings = settings_of(name, settings)
    if settings.software == "peft":
        return System(name, settings, PeftModel(model_dir, adapters, settings.engine.dtype))
    if settings.software == "packed":
        return System(name, settings, Packed.from_pretrained(model_dir, adapters, settings.engine))
    config = _split(settings, model_dir) if settings.split_memory else settings.engine
    policy = None if settings.policy is None else make_policy(settings.policy, **settings.policy_settings)
    engine = Engine.from_pretrained(model_dir, config, policy=policy)
    try:
        for adapter, directory in tqdm(adapters.items(), desc="loading adapters", disable=not config.progress):
            engine.load_adapter(adapter, directory)
    except BaseException:
        engine.close()
        raise
    return System(name, replace(settings, engine=config), engine)


def _split(settings: SystemSettings, model_dir: Path) -> EngineConfig:
    """Returns the engine's settings with a share of its pages set aside for adapters."""
    num_pages = pool_shape(ModelConfig.from_directory(model_dir), settings.engine).num_pages
    adapter_pages = int(settings.split * (num_pages - 1))
    if adapter_pages < 1:
        raise ConfigError(f"SystemSettings.split={settings.split}: leaves adapters nothing of {num_pages} pages")
    return replace(settings.engine, num_pages=num_pages, adapter_pages=adapter_pages)
