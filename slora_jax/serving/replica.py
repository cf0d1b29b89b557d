"""One replica: the service's app inside a Ray Serve actor, driven in process instead of over a socket."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from slora_jax.engine import Engine
from slora_jax.serving.app import create_app
from slora_jax.serving.engine_loop import SWITCH_SECONDS
from slora_jax.serving.settings import ServerSettings

READY_SECONDS = 0.1
"""Between two looks at whether a new replica's engine is there."""

MAX_HOMES = 4096
"""Adapters at home in a replica, where no other bound is known: what an engine's pool has slots for."""

_CROSSING = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers"),
    *("client", "server"),
)
"""The keys of a scope that go to another process; the rest belongs to this one."""


@dataclass(frozen=True)
class HttpRequest:
    """A request whose body has been read."""

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Any, body: bytes) -> HttpRequest:
        return cls({key: scope[key] for key in _CROSSING if key in scope}, body)

    @classmethod
    def get(cls, path: str) -> HttpRequest:
        """A GET of this process's own."""
        return cls(
            {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "GET",
                "scheme": "http",
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "root_path": "",
                "headers": [],
                "client": None,
                "server": None,
            },
            b"",
        )


@dataclass(frozen=True)
class Answer:
    """A whole response of the replica of this rank (0, 1, ...)."""

    rank: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def respond(app: ASGIApp, request: HttpRequest) -> AsyncIterator[list[Message]]:
    """What `app` sends, as soon as it is there; what has piled up meanwhile comes together. Closing the iterator early
    is the client's disconnect.

    Raises: what `app` raises.
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
    """The deployment's class. Ray Serve calls all of it, in the actor's event loop."""

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]
        """Returns when the engine takes requests: until then the replica is not routed to.

        Raises:
          RuntimeError: the engine could not be made, and why.
        """
        from ray import serve

        sys.setswitchinterval(SWITCH_SECONDS)
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
        self._home = _home(most_resident(self._app.state.service.loop.engine) + 1)
        # Ray reports homes in the context of the first call: this one's, since a request's may be cancelled.
        await self._home(settings.base_name)

    async def stream(self, request: HttpRequest, adapter: str | None) -> AsyncIterator[list[Message]]:
        """A generation, under way. The adapter is at home here from now on if it was when it was routed, or is found to
        be one (its first request)."""
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
        """Anything else, whole."""
        status, headers, body = 500, [], b""
        async for messages in respond(self._app, request):
            for message in messages:
                if message["type"] == "http.response.start":
                    status, headers = message["status"], message["headers"]
                else:
                    body += message.get("body", b"")
        return Answer(self.rank, status, [(bytes(name), bytes(value)) for name, value in headers], body)

    async def check_health(self) -> None:
        """Ray Serve asks now and then, and replaces a replica that raises."""
        answer = await self._get("/health")
        if answer.status != 200:
            raise RuntimeError(answer.body.decode(errors="replace"))

    async def __del__(self) -> None:
        """Ray Serve awaits it before the process ends."""
        await self._held.aclose()

    async def _get(self, path: str) -> Answer:
        return await self.answer(HttpRequest.get(path))


def _home(most: int) -> Callable[[str], Awaitable[str]]:
    """Called with an adapter, it tells the router that requests for the adapter should come to this replica. When there
    are more than `most`, the one called for the longest ago is forgotten."""
    from ray import serve

    @serve.multiplexed(max_num_models_per_replica=most)
    async def home(adapter: str) -> str:
        return adapter

    return home


def most_resident(engine: Engine) -> int:
    """How many adapters of the registered ones' mean size its pool can hold, with nothing else in it."""
    pages = [info.num_pages for info in engine.store.infos()]
    fit = engine.allocator.num_pages * len(pages) // max(1, sum(pages)) if pages else MAX_HOMES
    return max(1, min(fit, engine.config.adapter_slots or MAX_HOMES))
