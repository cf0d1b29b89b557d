"""Several replicas of the service behind Ray Serve's router (extra `ray`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slora_jax.engine import Engine
from slora_jax.errors import ConfigError
from slora_jax.serving.replica import Replica
from slora_jax.serving.settings import ServerSettings

APPLICATION = "slora"
"""The Ray Serve application."""
OBJECT_STORE_BYTES = 100 << 20
"""Of Ray's shared memory: what passes through it here are small messages."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports nothing to anybody
    "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "0.1",  # for a full replica to have room
}


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas, and what each may take.

    replicas: their number. cpus: cores that Ray sets aside for each (it counts them, it does not bind). ongoing:
    requests that the router gives a replica at once; beyond it the replica is full and its adapters' requests go
    elsewhere; None: those that its engine can run, and half as many that it can prepare for. by_adapter: whether the
    router is told which adapter a request is for.
    """

    replicas: int = 2
    cpus: float = 0.5
    ongoing: int | None = None
    by_adapter: bool = True

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas={self.replicas}: must be at least 1")
        if self.cpus <= 0:
            raise ConfigError(f"cpus={self.cpus}: must be positive")
        if self.ongoing is not None and self.ongoing < 1:
            raise ConfigError(f"ongoing={self.ongoing}: must be at least 1")


@contextmanager
def run_replicas(
    settings: ServerSettings, own: ReplicaSettings, build: Callable[[], Engine], **options: Any
) -> Iterator[Any]:
    """Inside the block the replicas take requests; yields the deployment's handle. Ray runs on this machine, on the
    loopback interface, unless `RAY_ADDRESS` names a cluster, whose other machines then need the same files.

    build: makes the engine, in each replica. options: further ones of the deployment, for experiments.

    Raises:
      ConfigError: Ray is not installed.
      RuntimeError: a replica cannot be started.
    """
    ray, serve = _import_ray()
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(1, round(own.cpus * own.replicas + 1)),
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
    else:
        ray.init(address=address, logging_level=logging.WARNING)
    try:
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=own.replicas,
            max_ongoing_requests=own.ongoing or settings.engine.max_seqs * 3 // 2,
            max_queued_requests=settings.limits.waiting,
            health_check_period_s=1.0,
            health_check_timeout_s=10.0,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=settings.drain_seconds,
            ray_actor_options=_resources(ray, settings, own),
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            **options,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        try:
            yield serve.run(deployment.bind(settings, build), name=APPLICATION, route_prefix=None)
        finally:
            serve.delete(APPLICATION) if address != "local" else serve.shutdown()
    finally:
        ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        # Ray's own switch for clusters of one machine: its services listen on 127.0.0.1 alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"replicas need Ray Serve: pip install 'slora-jax[ray]' ({error})") from error
    return ray, serve


def _resources(ray: Any, settings: ServerSettings, own: ReplicaSettings) -> dict[str, float]:
    """GPUs for the engine's devices where the cluster has any."""
    if ray.cluster_resources().get("GPU"):
        return {"num_gpus": settings.engine.tp, "num_cpus": own.cpus}
    return {"num_cpus": own.cpus}
