"""Several replicas of the service behind Ray Serve's router (extra `ray`)."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.serving.access import Access
from slora_jax.serving.limits import Gate
from slora_jax.serving.replica import Replica
from slora_jax.serving.server import serve_app
from slora_jax.serving.settings import ServerSettings

REPLICA_CPUS = 0.5
"""Cores that Ray sets aside for each; it counts them, it does not bind."""
OBJECT_STORE_BYTES = 100 << 20
"""Of Ray's shared memory: what passes through it here are small messages."""
MAX_STARTS = 3
"""Failed starts of replicas, after which no more are tried."""

_ENVIRONMENT = {
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports nothing to anybody
    "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "0.02",  # that a request waits for its adapter's replica
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",  # for a replica to say how full it is
    "GRPC_VERBOSITY": "ERROR",  # it comments on every fork otherwise
}


def serve_replicas(settings: ServerSettings, listener: socket.socket) -> int:
    """Like `serve.serve`, by several engines. Returns 1 if no replica can be started.

    Raises:
      ConfigError: Ray is not installed, or has not the GPUs.
    """
    with ExitStack() as held:
        if settings.adapters is None and settings.state_file is None:  # a new replica must know of loads and unloads
            directory = held.enter_context(TemporaryDirectory(prefix="slora-"))
            settings = replace(settings, state_file=Path(directory) / "adapters.json")
        handle = held.enter_context(run_replicas(settings))
        from slora_jax.serving.replica_front import ReplicaFront

        front = ReplicaFront(handle, settings)
        return serve_app(
            Gate(front, settings.limits, Access(settings.api_keys), lambda *_: None), settings, front, listener
        )


@contextmanager
def run_replicas(settings: ServerSettings, **options: Any) -> Iterator[Any]:
    """Starts the replicas, which take requests when their engines are there; they end with the block. Yields their
    deployment's handle. Ray runs on this machine, on the loopback interface, unless `RAY_ADDRESS` names a cluster; its
    other machines then need the same files.

    options: further ones of the deployment, for experiments.

    Raises:
      ConfigError: Ray is not installed, or has not the GPUs.
    """
    ray, serve = _import_ray()
    from slora_jax.serving.replica_front import APPLICATION

    is_local = os.environ["RAY_ADDRESS"] == "local"
    cluster = {"num_cpus": math.ceil(REPLICA_CPUS * settings.replicas), "object_store_memory": OBJECT_STORE_BYTES}
    _init(ray, include_dashboard=False, logging_level=logging.WARNING, **(cluster if is_local else {}))
    try:
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.replica_requests or settings.engine.max_num_seqs * 3 // 2,
            max_queued_requests=settings.limits.waiting,
            max_constructor_retry_count=MAX_STARTS,
            health_check_period_s=1.0,
            health_check_timeout_s=10.0,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=settings.drain_seconds,
            ray_actor_options=_resources(ray, settings),
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            **options,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        target = serve.RunTarget(deployment.bind(settings), name=APPLICATION, route_prefix=None)
        try:
            [handle] = serve.run_many([target], wait_for_applications_running=False)
            yield handle
        finally:
            if is_local:
                serve.shutdown()
            else:
                serve.delete(APPLICATION)
    finally:
        ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    """Ray reads its environment when it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_ADDRESS"] == "local":
        # Ray's own switch for clusters of one machine: its services listen on 127.0.0.1 alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"replicas need Ray Serve: make install EXTRAS=ray ({error})") from error
    return ray, serve


def _init(ray: Any, **arguments: Any) -> None:
    """Ray gives its processes 30 s to start, which is too little on a machine that is busy: once more."""
    try:
        ray.init(**arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init(**arguments)


def _resources(ray: Any, settings: ServerSettings) -> dict[str, float]:
    """GPUs for the engine's devices where the cluster has any."""
    there = ray.cluster_resources().get("GPU", 0)
    if not there:
        return {"num_cpus": REPLICA_CPUS}
    wanted = settings.engine.tensor_parallel_size * settings.replicas
    if wanted > there:
        raise ConfigError(
            f"replicas={settings.replicas}: need {wanted} GPUs (tensor_parallel_size="
            f"{settings.engine.tensor_parallel_size}), Ray has {there:g}"
        )
    return {"num_gpus": settings.engine.tensor_parallel_size, "num_cpus": REPLICA_CPUS}
