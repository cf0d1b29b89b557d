"""Runs against a running server, which has its own model, adapters and settings."""

from __future__ import annotations

import os
import time
from typing import Any

from tqdm import tqdm

from experiments.config.schema import RunConfig
from experiments.runners.figures import run_figures
from experiments.runners.workload import run_workload
from experiments.serving.client import Client, serve_over_http
from experiments.workloads import engine_requests
from slora_jax import ConfigError


def run_served(run: RunConfig) -> dict[str, Any]:
    """Returns the figures of a run as a client measures them, and `failed`, the number of failed requests. `queue_time`
    is the time to the first token: a client sees no queue.

    Raises:
      ConfigError: the server does not answer, lacks an adapter, or answered no request.
    """
    key_env = run.server.key_env
    if key_env is not None and key_env not in os.environ:
        raise ConfigError(f"server.key_env={key_env!r}: the environment has no such variable; set it to the API key")
    client = Client(run.server.url, None if key_env is None else os.environ[key_env], run.server.timeout_seconds)
    base, adapters = client.models()
    work = run_workload(run)
    used = sorted({int(adapter) for adapter in work.adapter} - {-1})
    if work.names is None:
        if used and used[-1] >= len(adapters):
            raise ConfigError(f"adapters.count={len(work.ranks)}: the server has {len(adapters)}: {adapters[:20]}")
    elif missing := [work.names[i] for i in used if work.names[i] not in adapters]:
        raise ConfigError(f"the log names adapter {missing[0]!r}; the server has {adapters[:20]}")
    names = adapters if work.names is None else work.names
    requests = engine_requests(work, run.model_config().vocab_size, run.seed)
    models = [base if number < 0 else names[number] for number in work.adapter.tolist()]
    start = time.perf_counter()
    with tqdm(total=len(requests), desc="replaying", unit="req", leave=False) as bar:
        records, failures = serve_over_http(client, requests, models, bar.update)
    if len(failures) == len(requests):
        raise ConfigError(f"no request was answered; {failures[0]}")
    figures = run_figures(records, start, run.slo_seconds, run.dollars_per_hour)
    return figures | {"failed": len(failures)} | ({"first_failure": failures[0]} if failures else {})
