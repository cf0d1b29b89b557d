"""A system of the comparison, ready to serve workloads."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from experiments.systems.packed import Packed
from experiments.systems.peft import PeftModel, serve_by_sweeps
from experiments.systems.serving import Run, serve
from experiments.systems.settings import SystemSettings
from experiments.workloads.requests import WorkloadRequest
from slora_jax import Engine
from slora_jax.metrics import RequestRecord


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
