"""Where requests find their adapters, of two replicas: `python -m experiments.replica_affinity [--output FILE]`.

Two replicas of a small random Llama behind Ray Serve's router, 100 adapters of which a quarter fits into one replica's
pool, a closed loop of HTTP clients on the loopback interface. Ways to route the same requests:

- `adapter`: the router is told the adapter and prefers the replica that has it (`slora serve --replicas 2`);
- `load`: it is not, and takes the less busy of the two (Ray's default);
- `round robin`: a router that takes turns.

Popularity of the adapters: `zipf` (exponent 1), `uniform`, and `hot`: nine of ten requests are for one adapter, from
more clients than one replica takes. Measured by each replica's own counters: the share of requests that found their
adapter on the device; loads, evictions, and how the requests were spread. `ideal` is what the same requests would find
if every adapter belonged to one replica, equally loaded, and each replica kept as many of its own as it was seen to
hold, the most recently used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from experiments.machine import provenance
from experiments.workloads.popularity import zipf_shares
from slora_jax import EngineConfig
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.serving.replicas.deployment import run_replicas
from slora_jax.serving.settings import ServerSettings

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "replica_affinity.json"
TARGETS = ("q", "k", "v", "o")
ROUND_ROBIN = "experiments.round_robin_router.RoundRobinRouter"
REPLICAS = 2
POPULARITIES = ("zipf", "uniform", "hot")
GAUGE = "adapters"
RESIDENT = ("device", "pinned")  # states of adapters in the pool
COUNTERS = ("adapter_hits", "adapter_loads", "adapter_evictions", "requests")
SETTLE_SECONDS = 2.0
"""For the last request's counters to be seen, and for Ray's replicas to have reported what they hold."""


@dataclass(frozen=True)
class Settings:
    """layers, rank: of the model and of the adapters. fraction: of the adapters that fit into one pool. clients: that
    have one request each under way; hot_clients, under `hot`. warmup, requests: not measured, measured, of each
    combination. prompt, output: tokens of a request. replica_requests: with which a replica is full."""

    layers: int = 1
    rank: int = 8
    adapters: int = 100
    fraction: float = 0.25
    clients: int = 16
    hot_clients: int = 32
    hot_share: float = 0.9
    warmup: int = 200
    requests: int = 1000
    prompt: int = 8
    output: int = 8
    max_num_seqs: int = 8
    replica_requests: int = 12
    seed: int = 0

    def shares(self, popularity: str) -> np.ndarray:
        """Of the requests, by adapter."""
        match popularity:
            case "zipf":
                return zipf_shares(self.adapters, 1.0)
            case "uniform":
                return zipf_shares(self.adapters, 0.0)
        return np.r_[self.hot_share, np.full(self.adapters - 1, (1 - self.hot_share) / (self.adapters - 1))]

    def draw(self, popularity: str) -> list[int]:
        """The adapter of each request."""
        count = self.warmup + self.requests
        draws = np.random.default_rng(self.seed).choice(self.adapters, count, p=self.shares(popularity))
        return [int(one) for one in draws]


def write_model(directory: Path, settings: Settings) -> ServerSettings:
    """A model, its adapters, and a server for them."""
    write_checkpoint(directory / "model", settings.layers, settings.seed)
    page_size = EngineConfig.page_size
    geometry = adapter_geometry(ModelConfig.from_directory(directory / "model"), page_size)
    for i in range(settings.adapters):
        adapter = random_adapter(geometry, settings.rank, TARGETS, seed=settings.seed + i)
        write_peft(directory / "adapters" / f"adapter-{i:03d}", adapter, dtype="float32")
    pages = int(geometry.layout.num_pages(adapter.ranks.max(axis=0)))
    kv = settings.max_num_seqs * -(-(settings.prompt + settings.output) // page_size)
    config = EngineConfig(
        dtype="float32",
        num_pages=1 + kv + round(settings.fraction * settings.adapters * pages),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=32,
        max_model_len=64,
        max_lora_rank=settings.rank,
        decode_buckets=(settings.max_num_seqs,),
        mixed_buckets=(32,),
        prefix_cache=False,
        progress=False,
    )
    return ServerSettings(
        directory / "model",
        name="base",
        adapters=directory / "adapters",
        engine=config,
        replicas=REPLICAS,
        replica_requests=settings.replica_requests,
    )


class Cluster:
    """Two replicas behind HTTP, and clients of them."""

    def __init__(self, handle: Any, server: ServerSettings, settings: Settings) -> None:
        self._handle, self._server, self._settings = handle, server, settings

    async def measure(self, cases: dict[str, bool]) -> dict[str, Any]:
        """By case and popularity. cases: names, and whether the router is told the adapter."""
        results: dict[str, Any] = {}
        for case, by_adapter in cases.items():
            async with self._http(by_adapter) as client:
                results[case] = {name: await self._run(client, f"{case}, {name}", name) for name in POPULARITIES}
        return results

    @asynccontextmanager
    async def _http(self, by_adapter: bool) -> AsyncIterator[httpx.AsyncClient]:
        from slora_jax.serving.replicas.front import ReplicaFront

        front = ReplicaFront(self._handle, self._server, by_adapter=by_adapter)
        server = uvicorn.Server(uvicorn.Config(front, host="127.0.0.1", port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while front.num_replicas < REPLICAS or not server.started:
            await asyncio.sleep(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:
            yield client
        server.should_exit = True
        await serving

    async def _run(self, client: httpx.AsyncClient, name: str, popularity: str) -> dict[str, Any]:
        settings = self._settings
        adapters = settings.draw(popularity)
        clients = settings.hot_clients if popularity == "hot" else settings.clients
        await self._requests(client, f"{name}, warm-up", adapters[: settings.warmup], clients)
        before = await self._counters(client)
        start = time.perf_counter()
        latencies = await self._requests(client, name, adapters[settings.warmup :], clients)
        seconds = time.perf_counter() - start
        after = await self._counters(client)
        delta = {key: after[key] - before[key] for key in after}
        total = {name: sum(delta[name, replica] for replica in range(REPLICAS)) for name in COUNTERS}
        assert total["requests"] == settings.requests, f"{total} of {settings.requests}"
        resident = [int(after[GAUGE, replica]) for replica in range(REPLICAS)]
        spread = sorted(delta["requests", replica] / settings.requests for replica in range(REPLICAS))
        result = {
            "resident_share": round(total["adapter_hits"] / settings.requests, 4),
            "resident_share_ideal": round(ideal(adapters, settings.shares(popularity), min(resident), settings), 4),
            "adapter_loads": int(total["adapter_loads"]),
            "adapter_evictions": int(total["adapter_evictions"]),
            "resident_adapters": resident,
            "requests_of_busier_replica": round(spread[-1], 4),
            "requests_per_second": round(settings.requests / seconds, 1),
            "latency_p50_ms": round(1e3 * float(np.percentile(latencies, 50)), 1),
            "latency_p99_ms": round(1e3 * float(np.percentile(latencies, 99)), 1),
        }
        tqdm.write(f"{name:22} {json.dumps(result)}")
        return result

    async def _requests(self, client: httpx.AsyncClient, name: str, adapters: list[int], clients: int) -> list[float]:
        """Every client sends its next request when it has the last one's answer. Returns seconds."""
        waiting, latencies = iter(adapters), []
        random = np.random.default_rng(self._settings.seed)
        with tqdm(total=len(adapters), desc=name, unit="request") as bar:

            async def one_client() -> None:
                for adapter in waiting:
                    body = {
                        "model": f"adapter-{adapter:03d}",
                        "prompt": random.integers(4, 500, self._settings.prompt).tolist(),
                        "max_tokens": self._settings.output,
                        "ignore_eos": True,
                    }
                    start = time.perf_counter()
                    response = await client.post("/v1/completions", json=body)
                    response.raise_for_status()
                    latencies.append(time.perf_counter() - start)
                    bar.update()

            await asyncio.gather(*(one_client() for _ in range(clients)))
        return latencies

    async def _counters(self, client: httpx.AsyncClient) -> dict[tuple[str, int], float]:
        """By name and replica."""
        await asyncio.sleep(SETTLE_SECONDS)
        response = (await client.get("/metrics")).raise_for_status()
        found: Counter[tuple[str, int]] = Counter()
        for family in text_string_to_metric_families(response.text):
            name = family.name.removeprefix("slora_")
            if name in (*COUNTERS, GAUGE):
                for sample in family.samples:
                    if sample.name.endswith("_total") or sample.labels.get("state") in RESIDENT:
                        found[name, int(sample.labels["replica"])] += sample.value
        return {(name, replica): found[name, replica] for name in (*COUNTERS, GAUGE) for replica in range(REPLICAS)}


def ideal(adapters: list[int], shares: np.ndarray, capacity: int, settings: Settings) -> float:
    """The share that would be resident if each adapter belonged to one replica; from the busiest to the idlest, each to
    the one with less to do."""
    home, work = {}, [0.0] * REPLICAS
    for adapter in np.argsort(-shares):
        home[int(adapter)] = replica = int(np.argmin(work))
        work[replica] += shares[adapter]
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(REPLICAS)]
    hits = 0
    for i, adapter in enumerate(adapters):
        mine = held[home[adapter]]
        hits += adapter in mine and i >= settings.warmup
        mine[adapter] = None
        mine.move_to_end(adapter)
        if len(mine) > capacity:
            mine.popitem(last=False)
    return hits / settings.requests


def run(settings: Settings) -> dict[str, Any]:
    """All ways to route, for all popularities."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        server = write_model(Path(directory), settings)
        with run_replicas(server) as handle:
            results |= asyncio.run(Cluster(handle, server, settings).measure({"adapter": True, "load": False}))
        turns = {"request_router_config": {"request_router_class": ROUND_ROBIN}}
        with run_replicas(server, **turns) as handle:
            results |= asyncio.run(Cluster(handle, server, settings).measure({"round robin": False}))
    return {
        "command": "python -m experiments.replica_affinity",
        "replicas": REPLICAS,
        "settings": asdict(settings),
        "pool_pages": server.engine.num_pages,
        "results": results,
        "provenance": provenance(("jax", "jaxlib", "numpy", "ray", "fastapi", "uvicorn", "httpx")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=Settings.requests, help="measured of each combination")
    parser.add_argument("--warmup", type=int, default=Settings.warmup, help="sent before them")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    results = run(Settings(requests=args.requests, warmup=args.warmup))
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
