"""Two replicas behind Ray Serve's router answer as one engine, and each adapter's requests go to its replica.

The order of the last tests matters: one kills a replica, the next stops the service.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest
from live_server import ADAPTERS, MANAGE_KEY, SERVE_KEY, START_SECONDS, Files, LiveServer, until, write_adapter
from tiny_model import TinyModel
from wire import exchange, post

from slora_jax import Engine, SamplingParams
from slora_jax.serving.replicas.front import join_metrics, merge
from slora_jax.serving.replicas.replica import Answer, HttpRequest

pytestmark = pytest.mark.timeout(900)  # Ray starts a dozen processes
FULL = 4  # requests
PROMPT = "List all users of the"
ENDLESS: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
SETTLE_SECONDS = 1.2
"""Longer than the interval of an idle engine's snapshots, and than the router takes to learn an adapter's replica."""


class Replicas(LiveServer):
    """The service, and the state of its replicas."""

    def count(self) -> int:
        return json.loads(self.get("/health")[1])["replicas"]

    def wait_for(self, count: int) -> None:
        until(lambda: self.count() == count, f"{count} replicas", START_SECONDS)

    def by_replica(self, name: str) -> Counter[str]:
        """Returns a metric's value by rank."""
        time.sleep(SETTLE_SECONDS)
        found: Counter[str] = Counter()
        for (sample, labels), value in self.metrics(SERVE_KEY).items():
            if sample == f"slora_{name}":
                found[dict(labels)["replica"]] += int(value)
        return found

    def replica_processes(self) -> set[psutil.Process]:
        children = self.psutil().children(recursive=True)
        return {child for child in children if "ray::ServeReplica" in " ".join(child.cmdline())}


@pytest.fixture(scope="module")
def replicas(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    root = tmp_path_factory.mktemp("replicas")
    config = {
        "adapters": str(files.adapters),
        "adapter_roots": [str(files.uploads)],
        "state_file": str(root / "adapters.json"),
        "watch_seconds": 0.5,
        "limits": {"body_bytes": 1 << 20},
        "api_keys": [
            {"name": "serving", "key": SERVE_KEY},
            {"name": "managing", "key": MANAGE_KEY, "rights": ["serve", "manage"]},
        ],
        "replicas": 2,
        "replica_requests": FULL,
        "drain_seconds": 20,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # Ray starts a dozen processes, which share imports
        patch.setenv("PYTHONPYCACHEPREFIX", str(root / "bytecode"))
        with Replicas(files.model, root / "server.yaml", config) as server:
            server.wait_for(2)
            yield server


@pytest.fixture(scope="module")
def client(replicas: Replicas) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{replicas.url}/v1", api_key=SERVE_KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, max_tokens: int = 4) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=max_tokens, temperature=0, **ENDLESS)
    return answer.choices[0].text


@pytest.mark.parametrize("adapter", [None, "adapter-0"])
def test_tokens_equal_one_engines(client, engine: Engine, adapter: str | None) -> None:
    extra = {"extra_body": {"return_token_ids": True}}
    for seed in range(4):  # each replica answers some
        answer = client.completions.create(
            model=adapter or "base", prompt=PROMPT, max_tokens=12, temperature=0.9, seed=seed, **extra
        )
        [output] = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.9, seed=seed), [adapter])
        assert answer.choices[0].token_ids == output.token_ids


def test_stream_comes_in_pieces(client) -> None:
    arguments = {"model": "adapter-2", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 3, **ENDLESS}
    whole = client.completions.create(**arguments).choices[0].text
    pieces = list(client.completions.create(**arguments, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    assert len(pieces) > 1


def test_errors_are_passed_on(replicas: Replicas, client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "no-such-adapter")
    assert missing.value.body["code"] == "model_not_found" and missing.value.body["param"] == "model"
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="sk-wrong"), "base")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt=PROMPT, max_tokens=-1)
    large = exchange(replicas, post("/v1/completions", b" " * (1 << 20) + b" ", SERVE_KEY))
    assert large.status == 413 and large.json["error"]["code"] == "body_too_large"
    assert replicas.get("/v1/nothing", SERVE_KEY)[0] == 404


def test_requests_go_to_their_adapters_replica(replicas: Replicas, client) -> None:
    """Each of 6 adapters is at home in one replica; the other replica never loads it."""
    names = [f"adapter-{i}" for i in range(4, 10)]
    before = replicas.by_replica("adapter_loads_total")
    for name in names:
        ask(client, name)
    loaded = replicas.by_replica("adapter_loads_total")
    assert (loaded - before).total() == len(names)
    hits = replicas.by_replica("adapter_hits_total")
    for _ in range(3):
        for name in names:
            ask(client, name)
    assert replicas.by_replica("adapter_loads_total") == loaded
    assert (replicas.by_replica("adapter_hits_total") - hits).total() == 3 * len(names)


def test_adapters_of_all_replicas_are_listed_with_their_replica(replicas: Replicas, client) -> None:
    before = replicas.by_replica("requests_total")
    ask(client, "adapter-3")
    [served] = replicas.by_replica("requests_total") - before

    def listed(query: str) -> dict[str, Any]:
        return json.loads(replicas.get(f"/v1/adapters?{query}", SERVE_KEY)[1])

    entries = listed("search=adapter-3")["data"]
    assert {(one["name"], str(one["replica"])) for one in entries} == {("adapter-3", "0"), ("adapter-3", "1")}
    assert [str(one["replica"]) for one in entries if one["requests"]] == [served]
    assert str(entries[0]["replica"]) == served and entries[0]["state"] in ("device", "pinned")
    few = listed("limit=3")
    assert few["total"] == listed("")["total"] == 2 * ADAPTERS and len(few["data"]) == 3
    assert few["data"][0]["name"] == "adapter-3", "the one used last comes first"
    assert json.loads(replicas.get("/state", SERVE_KEY)[1])["replica"] == 0


def test_requests_spill_when_the_adapters_replica_is_full(replicas: Replicas, client) -> None:
    ask(client, "adapter-11")
    for count, spread in ((FULL, 1), (2 * FULL, 2)):
        before = replicas.by_replica("requests_total")
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(lambda _: ask(client, "adapter-11", max_tokens=64), range(count)))
        served = replicas.by_replica("requests_total") - before
        assert served.total() == count and len(served) == spread, served


def test_loads_and_unloads_reach_every_replica(replicas: Replicas, client, files: Files, tiny: TinyModel) -> None:
    write_adapter(files.uploads / "late", tiny, seed=77)
    change = {"lora_name": "late", "lora_path": str(files.uploads / "late")}
    assert replicas.post("/v1/load_lora_adapter", change, MANAGE_KEY)[0] == 200
    with ThreadPoolExecutor(2 * FULL) as threads:  # more than fit into one replica
        texts = set(threads.map(lambda _: ask(client, "late", max_tokens=24), range(2 * FULL)))
    assert len(texts) == 1
    assert replicas.post("/v1/unload_lora_adapter", {"lora_name": "late"}, MANAGE_KEY)[0] == 200
    for _ in range(6):
        with pytest.raises(openai.NotFoundError):
            ask(client, "late")
    assert replicas.post("/v1/unload_lora_adapter", {"lora_name": "late"}, MANAGE_KEY)[0] == 404


def test_disconnected_client_is_cancelled(replicas: Replicas, client) -> None:
    def cancelled() -> int:
        """Counts cancelled sequences of both replicas."""
        return sum(
            int(value)
            for (name, labels), value in replicas.metrics(SERVE_KEY).items()
            if name == "slora_requests_total" and dict(labels)["finish_reason"] == "cancelled"
        )

    before = cancelled()
    stream = client.completions.create(model="base", prompt=PROMPT, max_tokens=80, n=64, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    until(lambda: cancelled() > before, "its sequences are cancelled")
    until(lambda: not replicas.by_replica("running_requests").total(), "nothing runs")


def test_lost_replica_is_reported_and_replaced(replicas: Replicas, client) -> None:
    """Its clients get a standard error, the others are not affected, and a new replica starts."""
    has_begun = threading.Semaphore(0)

    def stream() -> str | None:
        try:
            with client.completions.create(
                model="base", prompt=PROMPT, max_tokens=80, stream=True, **ENDLESS
            ) as pieces:
                for _ in pieces:
                    has_begun.release()
            return "whole"
        except openai.APIError as error:
            return error.code

    before = replicas.replica_processes()
    assert len(before) == 2
    with ThreadPoolExecutor(2 * FULL) as threads:
        ends = [threads.submit(stream) for _ in range(2 * FULL)]
        for _ in ends:
            has_begun.acquire()
        os.kill(min(process.pid for process in before), signal.SIGKILL)
        outcomes = Counter(end.result(timeout=60) for end in ends)
    assert set(outcomes) <= {"whole", "replica_lost"} and outcomes["replica_lost"], outcomes
    assert ask(client, "adapter-0")  # from the other replica
    until(lambda: replicas.replica_processes() - before and replicas.count() == 2, "2 replicas", START_SECONDS)
    with ThreadPoolExecutor(2 * FULL) as threads:
        texts = set(threads.map(lambda _: ask(client, "adapter-1", max_tokens=24), range(2 * FULL)))
    assert len(texts) == 1


def test_stop_drains_and_leaves_no_process(replicas: Replicas, client) -> None:
    processes = replicas.psutil().children(recursive=True)
    pieces = client.completions.create(model="base", prompt=PROMPT, max_tokens=80, stream=True, **ENDLESS)
    next(iter(pieces))
    replicas.process.send_signal(signal.SIGTERM)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
    assert replicas.process.wait(60) == 0, replicas.log
    assert not psutil.wait_procs(processes, timeout=10)[1]


def test_answers_of_replicas_are_merged() -> None:
    def answers(*statuses: int) -> list[Answer]:
        return [Answer(rank, status, [], b"") for rank, status in enumerate(statuses)]

    change = HttpRequest({"path": "/v1/load_lora_adapter", "method": "POST"}, b"")
    assert merge(change, answers(400, 200)).status == 200  # it already followed the other's change
    assert merge(change, answers(200, 500)).status == 500
    assert merge(change, answers(404, 404)).rank == 0
    assert merge(HttpRequest.get("/ready"), answers(503, 200)).status == 200
    assert merge(HttpRequest.get("/v1/models"), answers(200, 200)).rank == 0
    texts = [(rank, f'# HELP a_total A.\n# TYPE a_total counter\na_total{{x="1"}} {rank}.0\n') for rank in (0, 1)]
    joined = join_metrics(texts).decode().splitlines()
    assert joined[2:] == ['a_total{replica="0",x="1"} 0.0', 'a_total{replica="1",x="1"} 1.0']
