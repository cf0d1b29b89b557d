"""One replica: the service's app inside a Ray Serve actor, driven in process instead of over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from slora_jax.engine import Engine
from slora_jax.serving.app import create_app
from slora_jax.serving.service import Service
from slora_jax.serving.settings import ServerSettings

READY_SECONDS = 0.1
"""Between two looks at whether a new replica's engine is there."""

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

    async def __init__(self, settings: ServerSettings, build: Callable[[], Engine]) -> None:  # type: ignore[misc]
        """Returns when the engine takes requests: until then the replica is not routed to. build: as of `create_app`.

        Raises:
          RuntimeError: the engine could not be made, and why.
        """
        from ray import serve

        self.rank: int = serve.get_replica_context().rank.rank
        self._home: Callable[[str], Awaitable[Any]] | None = None
        self._held = AsyncExitStack()
        self._app = create_app(settings, build)
        await self._held.enter_async_context(self._app.router.lifespan_context(self._app))
        try:
            while (answer := await self._get("/ready")).status != 200:
                if (await self._get("/health")).status != 200:
                    raise RuntimeError(answer.body.decode(errors="replace"))
                await asyncio.sleep(READY_SECONDS)
        except BaseException:
            await self._held.aclose()
            raise

    async def stream(self, request: HttpRequest, adapter: str | None) -> AsyncIterator[list[Message]]:
        """A generation, under way. The adapter is at home here from now on if it was when it was routed, or is found to
        be one (its first request)."""
        from ray import serve

        if adapter is not None and serve.get_multiplexed_model_id():
            await self._at_home(adapter)
        messages = respond(self._app, request)
        try:
            async for some in messages:
                if adapter is not None and some[0].get("status") == 200:
                    await self._at_home(adapter)
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

    async def _at_home(self, adapter: str) -> None:
        """Tells the router that requests for the adapter should come here. Homes are forgotten in LRU order, when there
        are more than adapters fit into the pool."""
        if self._home is None:
            from ray import serve

            async def home(adapter: str) -> str:
                return adapter

            service: Service = self._app.state.service
            self._home = serve.multiplexed(max_num_models_per_replica=most_resident(service))(home)
        await self._home(adapter)


def most_resident(service: Service) -> int:
    """How many adapters of the registered ones' mean size the pool can hold, with nothing else in it."""
    engine = service.loop.engine
    pages = [info.num_pages for info in engine.store.infos()]
    mean = sum(pages) / max(1, len(pages))
    return max(1, int(engine.allocator.num_pages / max(1.0, mean)))
