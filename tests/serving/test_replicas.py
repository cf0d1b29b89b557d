"""Two replicas behind Ray Serve's router, as `slora serve --replicas 2` starts them: same answers as one engine's, each
adapter where it already is."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest
import uvicorn
from conftest import MANAGE_KEY, SERVE_KEY, Files
from live_server import engine_config, write_adapter
from prometheus_client.parser import text_string_to_metric_families
from tiny_model import TinyModel

from slora_jax import ConfigError, Engine, SamplingParams
from slora_jax.serving.access import ApiKey
from slora_jax.serving.limits import Gate
from slora_jax.serving.replica import Answer, HttpRequest
from slora_jax.serving.replicas import ReplicaSettings, run_replicas
from slora_jax.serving.settings import ServerSettings

ONGOING = 4
PROMPT = "List all users of the"
ENDLESS: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


@dataclass(frozen=True)
class Replicas:
    """Two of them, behind HTTP at `url`."""

    url: str
    front: Any
    settings: ServerSettings

    def client(self, key: str = SERVE_KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def pids(self) -> set[int]:
        return {
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.name().startswith("ray::ServeReplic") or "ray::ServeReplica" in " ".join(child.cmdline())
        }

    def metric(self, name: str) -> Counter[int]:
        """A counter's or gauge's value by replica."""
        time.sleep(1.2)  # an idle engine is observed once a second
        found: Counter[int] = Counter()
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {SERVE_KEY}"}).text
        for family in text_string_to_metric_families(text):
            if family.name == f"slora_{name}":
                for sample in family.samples:
                    if sample.name.endswith("_total") or family.type == "gauge":
                        found[int(sample.labels["replica"])] += int(sample.value)
        return found

    def wait_for(self, count: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while self.front.num_replicas != count:
            assert time.monotonic() < deadline, f"{self.front.num_replicas} replicas"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def replicas(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    settings = ServerSettings(
        files.model,
        name="base",
        adapters=files.adapters,
        adapter_roots=(files.uploads,),
        state_file=tmp_path_factory.mktemp("replicas") / "adapters.json",
        watch_seconds=0.5,
        api_keys=(
            ApiKey.from_mapping({"name": "serving", "key": SERVE_KEY}, "api_keys[0]"),
            ApiKey.from_mapping({"name": "managing", "key": MANAGE_KEY, "rights": ["serve", "manage"]}, "api_keys[1]"),
        ),
        engine=engine_config(),
        drain_seconds=5,
    )
    with environment(JAX_NUM_CPU_DEVICES="8"), run_replicas(settings, ReplicaSettings(2, ongoing=ONGOING)) as handle:
        from slora_jax.serving.replica_front import ReplicaFront

        front = ReplicaFront(handle, settings, 2)
        app = Gate(front, settings.limits, lambda *_: None)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Replicas(f"http://127.0.0.1:{port}", front, settings)
        running.wait_for(2)
        yield running
        server.should_exit = True
        thread.join()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def client(replicas: Replicas) -> Iterator[openai.OpenAI]:
    with replicas.client() as client:
        yield client


def ask(client: openai.OpenAI, model: str, max_tokens: int = 4) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=max_tokens, temperature=0, **ENDLESS)
    return answer.choices[0].text


def settle() -> None:
    """Until the router knows what the replicas have told of their adapters."""
    time.sleep(1.0)


@pytest.mark.parametrize("adapter", [None, "adapter-0", "adapter-1"])
def test_tokens_are_those_of_one_engine(client, reference: Engine, adapter: str | None) -> None:
    extra = {"extra_body": {"return_token_ids": True}}
    for seed in range(4):  # some are answered by each replica
        answer = client.completions.create(
            model=adapter or "base", prompt=PROMPT, max_tokens=12, temperature=0.9, seed=seed, **extra
        )
        [output] = reference.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.9, seed=seed), [adapter])
        assert answer.choices[0].token_ids == output.token_ids


def test_a_stream_comes_in_pieces(client) -> None:
    arguments = {"model": "adapter-2", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 3}
    whole = client.completions.create(**arguments).choices[0].text
    pieces = list(client.completions.create(**arguments, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    assert len(pieces) > 5


def test_errors_pass_through(replicas: Replicas, client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "no-such-adapter")
    assert missing.value.body["code"] == "model_not_found" and missing.value.body["param"] == "model"
    with replicas.client("sk-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        ask(stranger, "base")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt=PROMPT, max_tokens=-1)
    large = httpx.post(f"{replicas.url}/v1/completions", content=b" " * (replicas.settings.limits.body_bytes + 1))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"


def test_an_adapters_requests_go_where_it_is(replicas: Replicas, client) -> None:
    """Of 6 adapters each is at home in one replica: however its requests come, the other one never loads it."""
    names = [f"adapter-{i}" for i in range(4, 10)]
    before = replicas.metric("adapter_loads")
    for name in names:
        ask(client, name)
    settle()
    loaded = replicas.metric("adapter_loads")
    assert (loaded - before).total() == len(names)
    requests = replicas.metric("requests")
    for _ in range(3):
        for name in names:
            ask(client, name)
    assert replicas.metric("adapter_loads") == loaded
    assert (replicas.metric("requests") - requests).total() == 3 * len(names)


def test_requests_spill_when_the_adapters_replica_is_full(replicas: Replicas, client) -> None:
    ask(client, "adapter-11")
    settle()
    for count, spread in ((ONGOING, 1), (2 * ONGOING, 2)):
        before = replicas.metric("requests")
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(lambda _: ask(client, "adapter-11", max_tokens=64), range(count)))
        served = replicas.metric("requests") - before
        assert served.total() == count and len(served) == spread, served


def test_loads_and_unloads_reach_every_replica(replicas: Replicas, files: Files, tiny: TinyModel) -> None:
    write_adapter(files.uploads / "late", tiny, seed=77)
    key = {"Authorization": f"Bearer {MANAGE_KEY}"}
    post = functools.partial(httpx.post, headers=key, timeout=60)
    body = {"lora_name": "late", "lora_path": str(files.uploads / "late")}
    assert post(f"{replicas.url}/v1/load_lora_adapter", json=body).status_code == 200
    with replicas.client() as client:
        with ThreadPoolExecutor(2 * ONGOING) as threads:  # more than one replica takes
            texts = set(threads.map(lambda _: ask(client, "late", max_tokens=24), range(2 * ONGOING)))
        assert len(texts) == 1
        assert post(f"{replicas.url}/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
        for _ in range(6):
            with pytest.raises(openai.NotFoundError):
                ask(client, "late")
        assert post(f"{replicas.url}/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 404


def test_a_client_that_goes_away_ends_its_request(replicas: Replicas, client) -> None:
    before = replicas.metric("generated_tokens")
    stream = client.completions.create(model="base", prompt=PROMPT, max_tokens=80, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    generated = (replicas.metric("generated_tokens") - before).total()
    assert 0 < generated < 70 and not replicas.metric("running_requests").total()


def test_a_lost_replica_is_told_and_replaced(replicas: Replicas, client) -> None:
    """Clients of the lost one get an error in the form that they know; the others notice nothing; and it comes back."""

    def stream() -> str:
        try:
            with client.completions.create(
                model="base", prompt=PROMPT, max_tokens=80, stream=True, **ENDLESS
            ) as pieces:
                for _ in pieces:
                    has_begun.release()
                return "whole"
        except openai.APIError as error:
            return str(getattr(error, "code", None))

    has_begun = threading.Semaphore(0)
    before = replicas.pids()
    assert len(before) == 2
    with ThreadPoolExecutor(2 * ONGOING) as threads:
        ends = [threads.submit(stream) for _ in range(2 * ONGOING)]
        for _ in ends:
            has_begun.acquire()
        os.kill(min(before), signal.SIGKILL)
        outcomes = Counter(end.result(timeout=60) for end in ends)
    assert set(outcomes) <= {"whole", "replica_lost"} and outcomes["replica_lost"], outcomes
    assert ask(client, "adapter-0")  # by the other
    deadline = time.monotonic() + 120
    while len(replicas.pids() - before) < 1 or replicas.front.num_replicas < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    texts = {ask(client, "adapter-1", max_tokens=12) for _ in range(4)}
    assert len(texts) == 1


def test_what_replicas_say_becomes_one_answer() -> None:
    from slora_jax.serving.replica_front import choose, join_metrics

    def answers(*statuses: int) -> list[Answer]:
        return [Answer(rank, status, [], b"") for rank, status in enumerate(statuses)]

    change = HttpRequest({"path": "/v1/load_lora_adapter", "method": "POST"}, b"")
    assert choose(change, answers(400, 200)).status == 200  # it had followed the other's change already
    assert choose(change, answers(200, 500)).status == 500
    assert choose(change, answers(404, 404)).rank == 0
    assert choose(HttpRequest.get("/ready"), answers(503, 200)).status == 200
    assert choose(HttpRequest.get("/v1/models"), answers(200, 200)).rank == 0
    texts = [(rank, f'# HELP a_total A.\n# TYPE a_total counter\na_total{{x="1"}} {rank}.0\n') for rank in (0, 1)]
    joined = join_metrics(texts).decode().splitlines()
    assert joined[2:] == ['a_total{replica="0",x="1"} 0.0', 'a_total{replica="1",x="1"} 1.0']


def test_settings_are_checked() -> None:
    for wrong in ({"replicas": 0}, {"cpus": 0}, {"ongoing": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ReplicaSettings(**wrong)
