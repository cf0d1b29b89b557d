"""Starts replicas of the service behind Ray Serve's router (extra `ray`)."""

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
from slora_jax.serving.http.access import Access
from slora_jax.serving.http.limits import Gate
from slora_jax.serving.http.server import serve_app
from slora_jax.serving.replicas.replica import Replica
from slora_jax.serving.settings import ServerSettings

REPLICA_CPUS = 0.5
"""Cores that Ray counts for each replica; they are not a limit."""
OBJECT_STORE_BYTES = 100 << 20
"""Size of Ray's shared memory, through which only small messages pass."""
MAX_STARTS = 3
"""Failed starts of replicas after which Ray stops trying."""

_ENVIRONMENT = {
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "0.02",  # longest wait for the adapter's replica
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",  # for a replica's queue length
    "GRPC_VERBOSITY": "ERROR",  # silences a warning at every fork
}


def serve_replicas(settings: ServerSettings, listener: socket.socket) -> int:
    """Serves like `serve.serve`, with several engines. Returns 1 if no replica can be started.

    Raises:
      ConfigError: Ray is not installed, or has too few GPUs.
    """
    with ExitStack() as held:
        if settings.adapters is None and settings.state_file is None:  # for loads and unloads to reach later replicas
            directory = held.enter_context(TemporaryDirectory(prefix="slora-"))
            settings = replace(settings, state_file=Path(directory) / "adapters.json")
        handle = held.enter_context(run_replicas(settings))
        from slora_jax.serving.replicas.front import ReplicaFront

        front = ReplicaFront(handle, settings)
        return serve_app(
            Gate(front, settings.limits, Access(settings.api_keys), lambda *_: None), settings, front, listener
        )


@contextmanager
def run_replicas(settings: ServerSettings, **options: Any) -> Iterator[Any]:
    """Runs the replicas during the block and yields their deployment's handle. A replica accepts requests once its
    engine is built. Ray runs on this machine, on the loopback interface, unless `RAY_ADDRESS` names a cluster, whose
    machines then need the same files.

    Args:
      options: further options of the deployment, for experiments.

    Raises:
      ConfigError: Ray is not installed, or has too few GPUs.
    """
    ray, serve = _import_ray()
    from slora_jax.serving.replicas.front import APPLICATION

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
    """Imports Ray, which reads its environment at import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_ADDRESS"] == "local":
        # Ray's switch for clusters of one machine: its services listen on 127.0.0.1 only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"replicas need Ray Serve: make install EXTRAS=ray ({error})") from error
    return ray, serve


def _init(ray: Any, **arguments: Any) -> None:
    """Starts Ray, twice if necessary: its limit of 30 s is too short on a busy machine."""
    try:
        ray.init(**arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init(**arguments)


def _resources(ray: Any, settings: ServerSettings) -> dict[str, float]:
    """Returns the resources of a replica: GPUs for its devices if the cluster has any."""
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
