"""The HTTP side of several replicas: an ASGI app that hands requests to Ray Serve's router and returns what comes.

Generations go through the router, keyed by adapter. All else is about the replicas themselves, so every one of them is
asked and the answers are made one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
from starlette.types import Receive, Scope, Send

from slora_jax.serving.errors import ApiError, JsonResponse, as_api_error, unavailable
from slora_jax.serving.replica import Answer, HttpRequest

GENERATIONS = ("/v1/completions", "/v1/chat/completions")
MAX_NAME = 512
"""Characters of a model's name that may be an adapter's."""
WATCH_SECONDS = 1.0
"""Between two counts of the replicas."""


class ReplicaFront:
    """The ASGI app. `handle`: of the deployment of `Replica`."""

    def __init__(self, handle: Any, base_name: str, *, by_adapter: bool = True, patience_seconds: float = 60.0) -> None:
        """by_adapter: whether the router is told the adapter; without, it balances load only. patience_seconds: for
        what every replica is asked."""
        self._handle = handle
        self._streams = handle.options(method_name="stream", stream=True)
        self._base_name, self._by_adapter, self._patience_seconds = base_name, by_adapter, patience_seconds
        self._adapters: set[str] = set()  # names that a replica has answered for: the router keeps what it is told
        self._waiting: set[Any] = set()  # responses of which nothing has come
        self.num_replicas = 0  # that answered when last asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["path"] == "/health":
            health = JsonResponse({"status": "alive", "replicas": self.num_replicas})
            await health(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        request = HttpRequest.of(scope, body)
        if scope["path"] in GENERATIONS and scope["method"] == "POST":
            await self._generate(request, receive, send)
        else:
            await self._ask_all(request, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await self._count()
        watch = asyncio.create_task(self._watch())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watch.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch(self) -> None:
        """When there is no replica left, those who wait for one are told: a new one may take minutes."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._count()
            if not self.num_replicas:
                for response in list(self._waiting):
                    response.cancel()

    async def _count(self) -> None:
        with suppress(TimeoutError):
            self.num_replicas = len(await self._broadcast(HttpRequest.get("/ready")))

    async def _generate(self, request: HttpRequest, receive: Receive, send: Send) -> None:
        adapter = self._adapter(request.body)
        streams = self._streams
        if self._by_adapter and adapter in self._adapters:
            streams = streams.options(multiplexed_model_id=adapter)
        if not self.num_replicas:
            await _send_error(_no_replica(), send)
            return
        response = streams.remote(request, adapter)
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda done: None if done.cancelled() else response.cancel())
        status, is_stream, is_whole = 0, False, False
        self._waiting.add(response)
        try:
            async for messages in response:
                self._waiting.discard(response)
                for message in messages:
                    if message["type"] == "http.response.start":
                        status = message["status"]
                        is_stream = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
                        if adapter is not None and status == 200:
                            self._adapters.add(adapter)
                    else:
                        is_whole = not message.get("more_body", False)
                    await send(message)
        except Exception as error:
            if gone.done() or is_whole:
                return
            told = _told(error)
            if not status:
                await _send_error(told, send)
            elif is_stream:
                await send({"type": "http.response.body", "body": _event(told), "more_body": False})
            else:
                raise
        finally:
            self._waiting.discard(response)
            gone.cancel()
            response.cancel()

    def _adapter(self, body: bytes) -> str | None:
        """The adapter that a body names, if it is one: the replica is the one to check."""
        try:
            name = json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            return None
        is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name != self._base_name
        return name if is_name else None

    async def _ask_all(self, request: HttpRequest, send: Send) -> None:
        try:
            answers = await self._broadcast(request)
        except TimeoutError:
            await _send_error(_too_late(self._patience_seconds), send)
            return
        if not answers:
            await _send_error(_no_replica(), send)
            return
        answer = choose(request, answers)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def _broadcast(self, request: HttpRequest) -> list[Answer]:
        """Of the replicas that answer, in order of rank. Raises TimeoutError."""
        try:
            broadcast = self._handle.broadcast("answer", request)
            answers = await broadcast.results_async(timeout_s=self._patience_seconds, return_exceptions=True)
        except (DeploymentUnavailableError, RayError):
            return []
        return sorted((one for one in answers if isinstance(one, Answer)), key=lambda one: one.rank)


def choose(request: HttpRequest, answers: Sequence[Answer]) -> Answer:
    """The one that speaks for all replicas. Of metrics, all of them, each with the replica's rank; of a change, the
    worst failure, else a success (a replica that had followed another's change already refuses its own); of /ready, any
    that is; otherwise the first replica's."""
    path, method = request.scope["path"], request.scope["method"]
    if path == "/metrics" and all(answer.status == 200 for answer in answers):
        first = answers[0]
        body = join_metrics([(answer.rank, answer.body.decode()) for answer in answers])
        headers = [(name, value) for name, value in first.headers if name != b"content-length"]
        return Answer(first.rank, 200, [*headers, (b"content-length", str(len(body)).encode())], body)
    if path == "/ready":
        return min(answers, key=lambda answer: answer.status)
    if method in ("GET", "HEAD", "OPTIONS"):
        return answers[0]
    return min(answers, key=lambda answer: (answer.status < 500, answer.status))


def join_metrics(texts: Sequence[tuple[int, str]]) -> bytes:
    """One exposition of several replicas', whose samples are told apart by a label `replica`."""

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


async def _read(receive: Receive) -> bytes | None:
    """A request's body, of bounded size by `Gate`; None: the client is gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _told(error: Exception) -> ApiError:
    """What a client is told of an error between it and its replica."""
    match error:
        case BackPressureError():
            return unavailable("the queue is full (limits.waiting)", code="queue_full", retry_after=2)
        case RayActorError():
            return unavailable("the replica that had the request is lost", code="replica_lost", retry_after=1)
        case DeploymentUnavailableError() | RequestCancelledError() | TaskCancelledError():
            return _no_replica()
    return as_api_error(error)


def _no_replica() -> ApiError:
    return unavailable("no replica answers; new ones are being started", code="no_replica", retry_after=10)


def _too_late(seconds: float) -> ApiError:
    return ApiError(504, f"a replica did not answer within {seconds:g} s", kind="server_error", code="replica_timeout")


def _event(error: ApiError) -> bytes:
    return b"data: " + json.dumps(error.body(), separators=(",", ":")).encode() + b"\n\n"


async def _send_error(error: ApiError, send: Send) -> None:
    response = error.response()
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})
