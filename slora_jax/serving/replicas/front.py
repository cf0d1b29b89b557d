"""The HTTP side of several replicas: an ASGI app that passes requests to Ray Serve's router and returns the answers.

Generations go through the router, keyed by adapter. All other requests concern the replicas themselves: they go to
every replica, and the answers are merged.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.serve.schema import ApplicationStatus
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from slora_jax.serving.http.errors import (
    ApiError,
    JsonResponse,
    as_api_error,
    incomplete,
    stopping,
    to_json,
    unavailable,
)
from slora_jax.serving.http.generation import event_of, on_disconnect
from slora_jax.serving.replicas.replica import BODILESS, Answer, HttpRequest
from slora_jax.serving.settings import ServerSettings

APPLICATION = "slora"
"""Name of the Ray Serve application."""
GENERATIONS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
MAX_NAME = 512
"""Longest name, in characters, that is passed to the router as an adapter's."""
WATCH_SECONDS = 1.0
"""Interval at which replicas are counted."""
COUNT_SECONDS = 10.0
"""Time for a replica to answer `/ready`."""


class ReplicaFront:
    """The ASGI app (`Served`)."""

    def __init__(self, handle: Any, settings: ServerSettings, *, by_adapter: bool = True) -> None:
        """Creates the app.

        Args:
          handle: handle of the deployment of `Replica`.
          by_adapter: whether the router knows the adapter; without it, the router balances load only.
        """
        self._handle, self._settings, self._by_adapter = handle, settings, by_adapter
        self._streams = handle.options(method_name="stream", stream=True)
        self._adapters: set[str] = set()  # answered by a replica before: the router never forgets a name
        self._under_way: set[_Generation] = set()
        self._is_draining = False
        self.num_replicas = 0  # that answered at the last count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def drain(self) -> None:
        self._is_draining = True
        deadline = time.monotonic() + self._settings.drain_seconds
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for generation in list(self._under_way):
            generation.end(incomplete())

    async def follow(self, say: Callable[[str], None]) -> int:
        before = 0
        while True:
            if self.num_replicas != before:
                before = self.num_replicas
                say(f"ready: {self._settings.base_name}, {before} of {self._settings.replicas} replicas")
            failure = None if before else await asyncio.to_thread(_failure)
            if failure is not None:
                say(f"no replica can be started: {failure}")
                return 1
            await asyncio.sleep(WATCH_SECONDS)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        watch = asyncio.create_task(self._watch())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watch.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch(self) -> None:
        """Counts the replicas. When none is left, waiting requests fail: a new replica may take minutes."""
        while True:
            with suppress(TimeoutError):
                self.num_replicas = len(await self._broadcast(HttpRequest.get("/ready"), COUNT_SECONDS))
                if not self.num_replicas:
                    for generation in list(self._under_way):
                        if not generation.status:
                            generation.end(_no_replica())
            await asyncio.sleep(WATCH_SECONDS)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] == "/health":
                status = {"status": "alive", "replicas": self.num_replicas}
                await JsonResponse(status)(scope, receive, send)
                return
            body = b"" if scope["method"] in BODILESS else await Request(scope, receive).body()
            request = HttpRequest.of(scope, body)
            if scope["path"] in GENERATIONS and scope["method"] == "POST":
                await self._generate(request, receive, send)
            else:
                await self._ask_all(request, send)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _generate(self, request: HttpRequest, receive: Receive, send: Send) -> None:
        if self._is_draining:
            raise stopping()
        if not self.num_replicas:
            raise _no_replica()
        adapter = self._adapter(request.body)
        streams = self._streams
        if self._by_adapter and adapter in self._adapters:
            streams = streams.options(multiplexed_model_id=adapter)
        generation = _Generation(streams.remote(request, adapter))
        self._under_way.add(generation)
        gone = on_disconnect(receive, lambda: generation.end(unavailable("the client has gone", code="gone")))
        try:
            await generation.pass_on(send)
        finally:
            gone.cancel()
            self._under_way.discard(generation)
        if adapter is not None and generation.status == 200:
            self._adapters.add(adapter)
        elif adapter is not None and generation.status == 404:
            self._adapters.discard(adapter)

    def _adapter(self, body: bytes) -> str | None:
        """Returns the name in a body that may be an adapter's; the replica checks it."""
        try:
            name = json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            return None
        base = self._settings.base_name
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name == base:
            return None
        return name.removeprefix(f"{base}:")

    async def _ask_all(self, request: HttpRequest, send: Send) -> None:
        seconds = self._settings.drain_seconds + COUNT_SECONDS  # an unload may wait for drain_seconds
        try:
            answers = await self._broadcast(request, seconds)
        except TimeoutError:
            message = f"a replica did not answer within {seconds:g} s"
            raise ApiError(504, message, kind="server_error", code="replica_timeout") from None
        if not answers:
            raise _no_replica()
        answer = merge(request, answers)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def _broadcast(self, request: HttpRequest, seconds: float) -> list[Answer]:
        """Returns the answers of all replicas that answer, by rank. Raises TimeoutError."""
        try:
            broadcast = self._handle.broadcast("answer", request)
            answers = await broadcast.results_async(timeout_s=seconds, return_exceptions=True)
        except (RayServeException, RayError):
            return []
        return sorted((one for one in answers if isinstance(one, Answer)), key=lambda one: one.rank)


class _Generation:
    """One generation between a replica and its client. status: HTTP status; 0 before the answer begins."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._end_reason: ApiError | None = None
        self._is_stream = self._is_whole = False
        self.status = 0

    def end(self, reason: ApiError) -> None:
        """Cancels the generation unless it is complete. Its client gets the reason."""
        if not self._is_whole:
            self._end_reason = reason
            self._response.cancel()

    async def pass_on(self, send: Send) -> None:
        """Sends the replica's messages to the client. An error becomes the last event of a stream that has begun.

        Raises:
          ApiError: an error before the answer began.
        """
        try:
            async for messages in self._response:
                for message in messages:
                    if message["type"] == "http.response.start":
                        self.status = message["status"]
                        types = [value for name, value in message["headers"] if name == b"content-type"]
                        self._is_stream = types[0].startswith(b"text/event-stream") if types else False
                    else:
                        self._is_whole = not message.get("more_body", False)
                    await send(message)
        except (RayError, RayServeException) as error:
            reason = self._end_reason or _reason(error)
            if not self.status:
                raise reason from error
            if not self._is_stream:
                raise
            await send({"type": "http.response.body", "body": event_of(reason.body()), "more_body": False})
        finally:
            if not self._is_whole:
                self._response.cancel()


def _reason(error: Exception) -> ApiError:
    """Converts an error between a client and its replica."""
    match error:
        case BackPressureError():
            return unavailable("the queue is full (limits.waiting)", code="queue_full", retry_after=2)
        case RayActorError():
            return unavailable("the replica that had the request is lost", code="replica_lost", retry_after=1)
        case DeploymentUnavailableError() | RequestCancelledError():
            return _no_replica()
    return as_api_error(error)


def _no_replica() -> ApiError:
    return unavailable("no replica answers; new ones are being started", code="no_replica", retry_after=10)


def _failure() -> str | None:
    """Returns why Ray Serve has stopped starting replicas; None if it has not."""
    application = serve.status().applications.get(APPLICATION)
    if application is None or application.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [one.message for one in application.deployments.values() if one.message] or [application.message]
    return messages[0].strip().splitlines()[-1]  # after Ray's traceback


def merge(request: HttpRequest, answers: Sequence[Answer]) -> Answer:
    """Merges the replicas' answers.

    /metrics and /v1/adapters: those of all, with their replica's rank. /ready: any that is ready. A change: the worst
    failure of a replica, else a success (a replica that already followed another's change refuses its own). All else:
    the first; /state says which replica that is.
    """
    path, method = request.scope["path"], request.scope["method"]
    join = JOINED.get(path)
    if join is not None and method == "GET" and all(answer.status == 200 for answer in answers):
        first = answers[0]
        body = join([(answer.rank, answer.body.decode()) for answer in answers], request.scope["query_string"])
        headers = [(name, value) for name, value in first.headers if name != b"content-length"]
        return Answer(first.rank, 200, [*headers, (b"content-length", str(len(body)).encode())], body)
    if path == "/ready":
        return min(answers, key=lambda answer: answer.status)
    if method in BODILESS:
        return answers[0]
    return min(answers, key=lambda answer: (answer.status < 500, answer.status))


def join_adapters(texts: Sequence[tuple[int, str]], query: bytes) -> bytes:
    """Joins the answers to /v1/adapters, given by rank: an entry for each adapter and replica, with its `replica`."""
    lists = [(rank, json.loads(text)) for rank, text in texts]
    entries = [entry | {"replica": rank} for rank, part in lists for entry in part["data"]]
    entries.sort(key=lambda entry: entry["last_used"] or 0.0, reverse=True)
    limit = parse_qs(query.decode("latin-1")).get("limit")
    joined = {
        "object": "list",
        "total": sum(part["total"] for _, part in lists),
        "data": entries[: int(limit[-1])] if limit else entries,
        "refused": {name: why for _, part in lists for name, why in part["refused"].items()},
    }
    return to_json(joined).encode()


def _name_replica(texts: Sequence[tuple[int, str]], query: bytes) -> bytes:
    """Returns the first of the answers to /state, with its `replica`."""
    rank, text = texts[0]
    return to_json(json.loads(text) | {"replica": rank}).encode()


def join_metrics(texts: Sequence[tuple[int, str]], query: bytes = b"") -> bytes:
    """Joins the expositions of several replicas, given by rank; each sample gets a label `replica`."""

    class Joined(Collector):
        def collect(self) -> Iterator[Metric]:
            families: dict[str, Metric] = {}
            for rank, text in texts:
                for family in text_string_to_metric_families(text):
                    joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    labels = {"replica": str(rank)}
                    joined.samples += [one._replace(labels={**one.labels, **labels}) for one in family.samples]
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(Joined())
    return generate_latest(registry)


JOINED = {"/metrics": join_metrics, "/v1/adapters": join_adapters, "/state": _name_replica}
"""Functions that join the answers to a path, given by rank, and its query."""
