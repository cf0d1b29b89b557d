"""Clients beyond their limits get a Retry-After, and requests under way are not affected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import borrowed_engine
import httpx
import pytest
from borrowed_engine import in_event_loop, until
from live_server import engine_config

from slora_jax import Engine, SamplingParams
from slora_jax.serving.service import Service
from slora_jax.serving.settings import ApiKey, Limits, ServerSettings

LIMITS = Limits(waiting=4, per_client=12, sequences=8, body_bytes=4000, bodies_bytes=6000)
"""16 sequences can run, so 20 are accepted in all."""


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until the event is set."""
    gate, dispatch = threading.Event(), engine.executor.dispatch
    gate.set()

    def wait(*args: Any) -> Any:
        gate.wait()
        return dispatch(*args)

    monkeypatch.setattr(engine.executor, "dispatch", wait)
    return gate


@dataclass
class Asked:
    """A service, called by its clients."""

    service: Service
    http: httpx.AsyncClient

    async def __call__(self, client: str, **body: Any) -> httpx.Response:
        """Returns an answer to client "a" or "b"."""
        body = {
            "prompt": [5, 6, 7],
            "max_tokens": 6,
            "ignore_eos": True,
            "return_token_ids": True,
            "temperature": 1.0,
        } | body
        headers = {"Authorization": f"Bearer sk-{client}"}
        return await self.http.post("/v1/completions", json=body, headers=headers, timeout=60)

    async def under_way(self, *asks: tuple[str, dict[str, Any]]) -> list[asyncio.Future[httpx.Response]]:
        """Sends requests and returns their future answers once the engine has them."""
        count = self.service.loop.num_unfinished + sum(body.get("n", 1) for _, body in asks)
        tasks = [asyncio.ensure_future(self(client, **body)) for client, body in asks]
        await until(lambda: self.service.loop.num_unfinished == count)
        return tasks


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Asked]:
    keys = tuple(ApiKey.from_mapping({"name": name, "key": f"sk-{name}"}, name) for name in "ab")
    settings = ServerSettings(Path(), name="base", api_keys=keys, limits=LIMITS, engine=engine_config())
    async with borrowed_engine.serving(engine, settings) as (service, http):
        yield Asked(service, http)
        assert service.shares._total == 0 and not service.shares._held


@in_event_loop
async def test_full_share_is_429_and_full_queue_503(engine: Engine, gate: threading.Event) -> None:
    bodies = [("a", {"n": 4, "seed": i, "prompt": [7 + i, 3]}) for i in range(3)]
    bodies.append(("b", {"n": 8, "seed": 9, "prompt": [40, 41]}))
    expected = [
        engine.generate(
            [body["prompt"]] * body["n"],
            [
                SamplingParams(max_tokens=6, temperature=1.0, seed=body["seed"] + i, ignore_eos=True)
                for i in range(body["n"])
            ],
        )
        for _, body in bodies
    ]
    async with serving(engine) as ask:
        gate.clear()
        tasks = await ask.under_way(*bodies)
        for _ in range(2):
            mine = await ask("a")
            assert mine.status_code == 429 and int(mine.headers["retry-after"]) >= 1
            assert mine.json()["error"]["code"] == "too_many_requests"
            assert "12 sequences of yours" in mine.json()["error"]["message"]
            all_of_us = await ask("b")
            assert all_of_us.status_code == 503 and int(all_of_us.headers["retry-after"]) >= 1
            assert all_of_us.json()["error"]["code"] == "queue_full"
        gate.set()
        for task, outputs in zip(tasks, expected, strict=True):
            answer = await task
            assert answer.status_code == 200
            tokens = [choice["token_ids"] for choice in answer.json()["choices"]]
            assert tokens == [output.token_ids for output in outputs]
        assert (await ask("a", n=8)).status_code == (await ask("b", n=8)).status_code == 200


@in_event_loop
async def test_too_many_sequences_of_one_request_are_400(engine: Engine, gate: threading.Event) -> None:
    async with serving(engine) as ask:
        for body in ({"n": 9}, {"prompt": [[1], [2], [3]], "n": 3}):
            answer = await ask("a", **body)
            assert answer.status_code == 400 and "one request may have 8" in answer.json()["error"]["message"]


@in_event_loop
async def test_failed_request_releases_its_share(engine: Engine, gate: threading.Event) -> None:
    async with serving(engine) as ask:
        for _ in range(3):
            assert (await ask("a", n=8, prompt=[10**6])).status_code == 400
            assert (await ask("a", n=8, prompt=[5] * 200)).status_code == 400
            assert (await ask("a", n=8, model="nobody")).status_code == 404
            assert (await ask("a", n=8, max_tokens=0)).status_code == 400
        assert (await ask("a", n=8)).status_code == 200


@in_event_loop
async def test_bodies_of_all_requests_are_bounded_together(engine: Engine, gate: threading.Event) -> None:
    async with serving(engine) as ask:
        large = {"user": "x" * 3000}
        gate.clear()
        tasks = await ask.under_way(("a", large))
        refused = await ask("b", **large)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "bodies_full"
        assert "retry-after" in refused.headers
        tasks += await ask.under_way(("b", {}))
        gate.set()
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await ask("b", **large)).status_code == 200
        assert (await ask("b", user="x" * 4000)).status_code == 413
