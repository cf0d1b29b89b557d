"""Adapter residency over several replicas: runs of mode "replicas".

A small random Llama behind Ray Serve's router, adapters of which a part fits into one replica's pool, a closed loop of
HTTP clients on the loopback interface. Measured by each replica's own counters: the share of requests that found their
adapter on the device; loads, evictions, and the spread of the requests. `resident_share_ideal` is the share that the
same requests would find if every adapter belonged to one replica, equally loaded, and each replica kept as many of its
own as it was seen to hold, the most recently used.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from experiments.config.schema import RunConfig
from experiments.rounds import Outcome
from experiments.runners.real import system_settings
from experiments.runners.workload import run_workload
from experiments.workloads import WorkloadRequest, engine_requests
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.demo.checkpoint import Widths, write_checkpoint
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.serving.replicas.deployment import run_replicas
from slora_jax.serving.settings import ServerSettings

ROUND_ROBIN = "experiments.serving.round_robin_router.RoundRobinRouter"
GAUGE = "adapters"
RESIDENT = ("device", "pinned")  # states of adapters in the pool
COUNTERS = ("adapter_hits", "adapter_loads", "adapter_evictions", "requests")
SETTLE_SECONDS = 2.0
"""Until the last request's counters are seen, and Ray's replicas have reported the adapters that they hold."""


class ReplicasRunner:
    """Keeps the last replicas for the next run, if that differs in its requests, or in whether the router knows the
    adapter, only."""

    def __init__(self) -> None:
        self._stack, self._key, self._running = ExitStack(), "", None
        self.close = self._stack.close

    def measure(self, run: RunConfig, round_number: int) -> Outcome:
        """Returns the figures of one round of a run."""
        server, handle, vocab_size = self._replicas(run)
        return asyncio.run(_Clients(run, server, handle, vocab_size, round_number).measure())

    def order(self, run: RunConfig) -> tuple[bool, str]:
        """Returns a key for sorting: runs for the replicas that run come first, then those that share others."""
        key = self._key_of(run)
        return key != self._key, key

    def _key_of(self, run: RunConfig) -> str:
        assert run.replicas is not None
        turns = run.replicas.route == "round_robin"
        shared = replace(run, workload=type(run.workload)(), client=type(run.client)(), replicas=None)
        return json.dumps([shared.to_json(), run.replicas.count, run.replicas.requests_per_replica, turns])

    def _replicas(self, run: RunConfig) -> tuple[ServerSettings, Any, int]:
        """Starts the replicas, unless they run. Returns their settings, their deployment's handle, and the size of the
        vocabulary."""
        assert run.replicas is not None
        if (key := self._key_of(run)) != self._key:
            self._key = ""
            self._stack.close()
            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            server, vocab_size = _write_model(run, directory)
            turns = {"request_router_config": {"request_router_class": ROUND_ROBIN}}
            options = turns if run.replicas.route == "round_robin" else {}
            handle = self._stack.enter_context(run_replicas(server, **options))
            self._key, self._running = key, (server, handle, vocab_size)
        assert self._running is not None
        return self._running


def _write_model(run: RunConfig, directory: Path) -> tuple[ServerSettings, int]:
    """Writes a model and its adapters. Returns the settings of a server for them, and the size of the vocabulary."""
    assert run.replicas is not None
    shape = ModelConfig.from_dict(json.loads(run.model_file.read_text()))
    widths = Widths(shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
    write_checkpoint(directory / "model", shape.num_layers, run.seed, widths)
    model = ModelConfig.from_directory(directory / "model")
    engine = system_settings(run, run.engine.max_model_len or 64).engine
    geometry = adapter_geometry(model, engine.page_size)
    for i in range(run.adapters.count):
        rank = run.adapters.ranks[i % len(run.adapters.ranks)]
        adapter = random_adapter(geometry, rank, run.adapters.targets, seed=run.seed + i)
        write_peft(directory / "adapters" / _name(i), adapter, dtype="float32")
    server = ServerSettings(
        directory / "model",
        name="base",
        adapters=directory / "adapters",
        engine=engine,
        replicas=run.replicas.count,
        replica_requests=run.replicas.requests_per_replica,
    )
    return server, model.vocab_size


def _name(adapter: int | str | None) -> str:
    return f"adapter-{int(adapter or 0):03d}"


class _Clients:
    """The requests of one round, sent to replicas through an HTTP front."""

    def __init__(self, run: RunConfig, server: ServerSettings, handle: Any, vocab_size: int, round_number: int) -> None:
        assert run.replicas is not None
        self._run, self._server, self._handle = run, server, handle
        self._replicas, self._warm_up = run.replicas.count, run.replicas.warm_up
        self._by_adapter = run.replicas.route == "adapter"
        requests = run.workload.parameters["requests"]
        parameters = {**run.workload.parameters, "requests": requests + self._warm_up}
        work = run_workload(replace(run, workload=replace(run.workload, parameters=parameters)), round_number)
        self._requests = engine_requests(work, vocab_size, run.seed + round_number)
        self._adapters = work.adapter

    async def measure(self) -> Outcome:
        async with self._http() as client:
            return await self._measure(client)

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[httpx.AsyncClient]:
        from slora_jax.serving.replicas.front import ReplicaFront

        front = ReplicaFront(self._handle, self._server, by_adapter=self._by_adapter)
        server = uvicorn.Server(uvicorn.Config(front, host="127.0.0.1", port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while front.num_replicas < self._replicas or not server.started:
            await asyncio.sleep(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:
            yield client
        server.should_exit = True
        await serving

    async def _measure(self, client: httpx.AsyncClient) -> Outcome:
        count = len(self._requests) - self._warm_up
        await self._send(client, self._requests[: self._warm_up])
        before = await self._counters(client)
        start = time.perf_counter()
        latencies = await self._send(client, self._requests[self._warm_up :])
        seconds = time.perf_counter() - start
        after = await self._counters(client)
        delta = {key: after[key] - before[key] for key in after}
        replicas = range(self._replicas)
        total = {name: sum(delta[name, replica] for replica in replicas) for name in COUNTERS}
        resident = [int(after[GAUGE, replica]) for replica in replicas]
        metrics = {
            "throughput": count / seconds,
            "resident_share": total["adapter_hits"] / count,
            "resident_share_ideal": ideal(self._adapters.tolist(), min(resident), self._warm_up, self._replicas),
            "adapter_loads": int(total["adapter_loads"]),
            "adapter_evictions": int(total["adapter_evictions"]),
            "requests_of_busiest_replica": max(delta["requests", replica] for replica in replicas) / count,
            "latency_p50": float(np.percentile(latencies, 50)),
            "latency_p99": float(np.percentile(latencies, 99)),
        }
        lost = count - int(total["requests"])
        problems = (f"the replicas counted {count - lost} of {count} requests",) if lost else ()
        return Outcome(metrics, None, {"resident_adapters": resident}, problems)

    async def _send(self, client: httpx.AsyncClient, requests: Sequence[WorkloadRequest]) -> list[float]:
        """Sends the requests: every user sends its next one when it has its last answer. Returns latencies in
        seconds."""
        waiting, latencies = iter(requests), []
        with tqdm(total=len(requests), desc="requests", unit="request", leave=False) as bar:

            async def one_user() -> None:
                for request in waiting:
                    body = request.body(_name(request.adapter)) | {"stream": False}
                    start = time.perf_counter()
                    (await client.post("/v1/completions", json=body)).raise_for_status()
                    latencies.append(time.perf_counter() - start)
                    bar.update()

            await asyncio.gather(*(one_user() for _ in range(self._run.client.users)))
        return latencies

    async def _counters(self, client: httpx.AsyncClient) -> dict[tuple[str, int], float]:
        """Returns the counters by name and replica."""
        await asyncio.sleep(SETTLE_SECONDS)
        response = (await client.get("/metrics")).raise_for_status()
        found: Counter[tuple[str, int]] = Counter()
        for family in text_string_to_metric_families(response.text):
            name = family.name.removeprefix("slora_")
            if name in (*COUNTERS, GAUGE):
                for sample in family.samples:
                    if sample.name.endswith("_total") or sample.labels.get("state") in RESIDENT:
                        found[name, int(sample.labels["replica"])] += sample.value
        return {
            (name, replica): found[name, replica] for name in (*COUNTERS, GAUGE) for replica in range(self._replicas)
        }


def ideal(adapters: Sequence[int], capacity: int, warm_up: int, replicas: int = 2) -> float:
    """Returns the share of the requests after the warm-up that would find their adapter resident if each adapter
    belonged to one replica. From the most to the least popular, an adapter belongs to the replica with the least work.

    Args:
      adapters: of each request, the warm-up's first.
      capacity: adapters that a replica holds.
      warm_up: requests that do not count.
    """
    home, work = {}, [0] * replicas
    for adapter, count in Counter(adapters).most_common():
        home[adapter] = replica = int(np.argmin(work))
        work[replica] += count
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    hits = 0
    for i, adapter in enumerate(adapters):
        mine = held[home[adapter]]
        hits += adapter in mine and i >= warm_up
        mine[adapter] = None
        mine.move_to_end(adapter)
        if len(mine) > capacity:
            mine.popitem(last=False)
    return hits / (len(adapters) - warm_up)
