"""One replica: the service's app inside a Ray Serve actor, called in process instead of over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from slora_jax.engine import Engine
from slora_jax.serving.http.app import create_app
from slora_jax.serving.interpreter import freeze_objects, prepare_interpreter
from slora_jax.serving.settings import ServerSettings

READY_SECONDS = 0.1
"""Interval at which a new replica's engine is polled."""

MAX_HOMES = 4096
"""Adapters at home in a replica if no other bound is known."""

BODILESS = ("GET", "HEAD", "OPTIONS")
"""Methods whose requests are passed on without a body, so that the probes need no key."""

_CROSSING = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers"),
    *("client", "server"),
)
"""Keys of a scope that go to another process."""


@dataclass(frozen=True)
class HttpRequest:
    """A request with its whole body."""

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Any, body: bytes) -> HttpRequest:
        """Copies a request for another process."""
        return cls({key: scope[key] for key in _CROSSING if key in scope}, body)

    @classmethod
    def get(cls, path: str) -> HttpRequest:
        """Creates a GET without a client."""
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
        }
        scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": []}
        return cls(scope | {"client": None, "server": None}, b"")


@dataclass(frozen=True)
class Answer:
    """A whole response of a replica. rank: the replica's number from 0."""

    rank: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def respond(app: ASGIApp, request: HttpRequest) -> AsyncIterator[list[Message]]:
    """Yields the messages that `app` sends, all that are ready at a time. Closing the iterator early disconnects the
    client. Raises the errors of `app`.
    """
    sent: list[Message] = []
    filled, gone = asyncio.Event(), asyncio.Event()
    bodies: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if bodies:
            return bodies.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        filled.set()

    serving = asyncio.ensure_future(app(dict(request.scope), receive, send))
    serving.add_done_callback(lambda _: filled.set())
    try:
        while sent or not serving.done():
            await filled.wait()
            filled.clear()
            if sent:
                messages = sent[:]
                sent.clear()
                yield messages
        serving.result()
    finally:
        gone.set()
        if not serving.done():
            serving.cancel()
            await asyncio.wait([serving])


class Replica:
    """Ray Serve's deployment. Ray Serve calls every method, in the actor's event loop."""

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]
        """Returns when the engine accepts requests; until then the router skips the replica.

        Raises:
          RuntimeError: the engine could not be built.
        """
        from ray import serve

        prepare_interpreter()
        self.rank: int = serve.get_replica_context().rank.rank
        self._held = AsyncExitStack()
        self._app = create_app(settings, settings.build_engine)
        await self._held.enter_async_context(self._app.router.lifespan_context(self._app))
        try:
            while (await self._get("/ready")).status != 200:
                await self.check_health()
                await asyncio.sleep(READY_SECONDS)
        except BaseException:
            await self._held.aclose()
            raise
        freeze_objects()
        self._home = _home(most_resident(self._app.state.service.loop.engine) + 1)
        # Ray reports homes in the context of the first call. A request's context may be cancelled, so it is this one.
        await self._home(settings.base_name)

    async def stream(self, request: HttpRequest, adapter: str | None) -> AsyncIterator[list[Message]]:
        """Streams a generation. Registers the adapter with the router for this replica: at once if the router chose
        this replica for it, otherwise when the request succeeds."""
        from ray import serve

        if adapter is not None and serve.get_multiplexed_model_id():
            await self._home(adapter)
        messages = respond(self._app, request)
        try:
            async for some in messages:
                if adapter is not None and some[0].get("status") == 200:
                    await self._home(adapter)
                yield some
        finally:
            await messages.aclose()  # type: ignore[attr-defined]

    async def answer(self, request: HttpRequest) -> Answer:
        """Answers any other request, whole."""
        status, headers, body = 500, [], b""
        async for messages in respond(self._app, request):
            for message in messages:
                if message["type"] == "http.response.start":
                    status, headers = message["status"], message["headers"]
                else:
                    body += message.get("body", b"")
        return Answer(self.rank, status, [(bytes(name), bytes(value)) for name, value in headers], body)

    async def check_health(self) -> None:
        """Raises if the engine is unusable; Ray Serve then replaces the replica."""
        answer = await self._get("/health")
        if answer.status != 200:
            raise RuntimeError(answer.body.decode(errors="replace"))

    async def __del__(self) -> None:
        """Stops the service; Ray Serve awaits this before the process ends."""
        await self._held.aclose()

    async def _get(self, path: str) -> Answer:
        return await self.answer(HttpRequest.get(path))


def _home(most: int) -> Callable[[str], Awaitable[str]]:
    """Returns a function that makes an adapter at home here: the router sends its requests to this replica. The least
    recently used of more than `most` adapters is dropped."""
    from ray import serve

    @serve.multiplexed(max_num_models_per_replica=most)
    async def home(adapter: str) -> str:
        return adapter

    return home


def most_resident(engine: Engine) -> int:
    """Returns how many adapters of mean size fit into the engine's pool."""
    pages = [info.num_pages for info in engine.store.infos()]
    fit = engine.allocator.num_pages * len(pages) // max(1, sum(pages)) if pages else MAX_HOMES
    return max(1, min(fit, engine.config.adapter_slots or MAX_HOMES))
