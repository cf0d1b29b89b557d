"""An HTTP process: parses, fills in templates, tokenizes and streams. The engine is in its parent process."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
import zmq
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slora_jax.engine import RequestOutput
from slora_jax.engine.outputs import Delta
from slora_jax.engine.sizing import longest_sequence
from slora_jax.engine.structured import Grammars
from slora_jax.engine.text import load_tokenizer
from slora_jax.models import ModelConfig
from slora_jax.scheduling import RequestMetrics, SamplingParams
from slora_jax.serving.health import Health
from slora_jax.serving.http.answers import EngineHealth
from slora_jax.serving.http.app import app_with_text
from slora_jax.serving.http.errors import ApiError, JsonResponse, unavailable
from slora_jax.serving.http.server import config_of
from slora_jax.serving.http_processes.messages import (
    Admit,
    Admitted,
    Ask,
    Drain,
    Failed,
    Hello,
    Incoming,
    Outgoing,
    Refused,
    Release,
    Reply,
    Served,
    Stop,
    Submit,
    Tokens,
    decode_to_http,
    error_of,
    socket_of,
)
from slora_jax.serving.interpreter import freeze_objects, prepare_interpreter
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.replicas.replica import BODILESS, HttpRequest
from slora_jax.serving.service import EngineFacts, GeneratingService
from slora_jax.serving.settings import ServerSettings

FORWARDED = SimpleNamespace(path="forwarded")
"""Route of a request that the engine's process answers, and counts."""
LOST_SECONDS = 3.0
"""Time from the end of the engine's process to the end of this one: until clients have their errors."""


class RemoteService(GeneratingService):
    """The service of an HTTP process."""

    def __init__(self, settings: ServerSettings, address: Path, name: bytes) -> None:
        """Connects to the engine's process, in the event loop."""
        super().__init__(settings)
        self.draining, self.stopped = asyncio.Event(), asyncio.Event()
        self._engine = _facts(settings)
        self._address, self._numbers = address, 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._mailboxes: dict[int, tuple[Mailbox, Sequence[list[int]]]] = {}
        self._lost: ApiError | None = None
        self._socket = socket_of(zmq.DEALER, name)
        self._socket.connect(f"ipc://{address}")
        self._incoming = Incoming(self._socket, self._received)
        self._outgoing = Outgoing(self._send)
        self._outgoing.add(Hello())

    @property
    def engine(self) -> EngineFacts:
        return self._engine

    @property
    def http_metrics(self) -> RemoteService:
        return self

    @property
    def is_lost(self) -> bool:
        """Returns whether the engine's process has ended."""
        return self._lost is not None

    def http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Counts an answer, unless the engine's process has counted it."""
        if route != FORWARDED.path:
            self._outgoing.add(Served(route, method, status, seconds))

    def refused(self, reason: str) -> None:
        """Counts a refused request."""
        self._outgoing.add(Refused(reason))

    async def check_model(self, model: str | None) -> None:
        await self._answer(lambda number: Admit(number, "", json.dumps(model).encode(), 0))

    async def admit(self, held: AsyncExitStack, client: str, model: str | None, sequences: int) -> int:
        def message(number: int) -> Admit:
            held.callback(self._release, number)
            return Admit(number, client, json.dumps(model).encode(), sequences)

        admitted: Admitted = await self._answer(message)
        return admitted.number

    def start(
        self,
        held: AsyncExitStack,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        admission: int,
        tenant: str,
        mailbox: Mailbox,
        priority: int = 0,
        *,
        is_streamed: bool = False,
    ) -> None:
        if self._lost is not None:
            mailbox.fail(self._lost)
            return
        self._mailboxes[admission] = mailbox, prompts
        sequences = json.dumps([[prompt, asdict(one)] for prompt, one in zip(prompts, params, strict=True)]).encode()
        self._outgoing.add(Submit(admission, sequences, tenant, priority, is_streamed))

    async def forward(self, request: HttpRequest) -> Reply:
        """Has the engine's process answer a whole request. Raises ApiError."""
        reply: Reply = await self._answer(lambda number: Ask(number, request.scope, request.body))
        return reply

    def close(self) -> None:
        """Ends the connection. If the engine's process has not removed its socket's directory, this does."""
        self._incoming.close()
        if self.is_lost:
            shutil.rmtree(self._address.parent, ignore_errors=True)

    def lose(self) -> None:
        """Fails all requests: the engine's process has ended."""
        self._lost = unavailable("the engine's process has ended", code="dead")
        for future in self._answers.values():
            if not future.done():
                future.set_exception(self._lost)
        for mailbox, _ in self._mailboxes.values():
            mailbox.fail(self._lost)

    async def _answer(self, message: Callable[[int], Admit | Ask]) -> Any:
        if self._lost is not None:
            raise self._lost
        self._numbers += 1
        number = self._numbers
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self._outgoing.add(message(number))
        try:
            return await future
        finally:
            del self._answers[number]

    def _release(self, number: int) -> None:
        self._mailboxes.pop(number, None)
        self._outgoing.add(Release(number))

    def _send(self, data: bytes) -> None:
        if not self.is_lost and not self._socket.closed:
            self._socket.send(data)
            self._incoming.read()

    def _received(self, arrived: Sequence[Sequence[bytes]]) -> None:
        filled: dict[Mailbox, None] = {}
        for message in chain.from_iterable(decode_to_http(data) for (data,) in arrived):
            match message:
                case Tokens():
                    mailbox, prompts = self._mailboxes.get(message.number, (None, ()))
                    if mailbox is not None:
                        mailbox.put(message.index, _delta(message, prompts[message.index]))
                        filled[mailbox] = None
                case Admitted() | Reply():
                    future = self._answers.get(message.number)
                    if future is not None and not future.done():
                        future.set_result(message)
                case Failed():
                    self._fail(message)
                case Drain():
                    self.draining.set()
                case Stop():
                    self.stopped.set()
        for mailbox in filled:
            mailbox.deliver()

    def _fail(self, message: Failed) -> None:
        future, error = self._answers.get(message.number), error_of(message)
        mailbox, _ = self._mailboxes.get(message.number, (None, ()))
        if future is not None and not future.done():
            future.set_exception(error)
        elif mailbox is not None:
            mailbox.fail(error)


class _Forward:
    """The application for all paths without a route in this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: RemoteService = scope["app"].state.service
        body = b"" if scope["method"] in BODILESS else await Request(scope, receive).body()
        scope["route"] = FORWARDED
        if service.is_lost and scope["path"] == "/health":
            answer: EngineHealth = {"status": str(Health.DEAD), "error": "the engine's process has ended"}
            await JsonResponse(answer, 503)(scope, receive, send)
            return
        reply = await service.forward(HttpRequest.of(scope, body))
        response = Response(reply.body, reply.status)
        response.raw_headers = reply.headers
        await response(scope, receive, send)


class _Server(uvicorn.Server):
    """Stops when the engine's process says so, or ends. The parent handles signals."""

    app: FastAPI

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        freeze_objects()
        await super().startup(sockets)
        self._following = asyncio.create_task(self._follow())
        parent = multiprocessing.parent_process()
        assert parent is not None
        asyncio.get_running_loop().add_reader(parent.sentinel, self._lose)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        service: RemoteService = self.app.state.service
        if not service.is_lost:
            await service.stopped.wait()
        await super().shutdown(sockets)

    async def _follow(self) -> None:
        await self.app.state.service.draining.wait()
        self.should_exit = True

    def _lose(self) -> None:
        events, service = asyncio.get_running_loop(), self.app.state.service
        parent = multiprocessing.parent_process()
        assert parent is not None
        events.remove_reader(parent.sentinel)
        service.lose()
        service.stopped.set()
        events.call_later(LOST_SECONDS, service.draining.set)


def run(settings: ServerSettings, listener: socket.socket, address: Path, name: bytes) -> None:
    """Serves until the engine's process ends it, or has ended."""
    prepare_interpreter()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a group of processes gets them together; the parent drains

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = RemoteService(settings, address, name)
        try:
            yield
        finally:
            app.state.service.close()

    def done(route: str | None, method: str, status: int, seconds: float) -> None:
        app.state.service.http(route, method, status, seconds)

    app = app_with_text(settings, lifespan, done)
    app.openapi_url = None
    app.router.routes[:] = [one for one in app.router.routes if getattr(one, "path", "") != "/openapi.json"]
    app.router.routes.append(Route("/{path:path}", _Forward()))
    server = _Server(config_of(app, settings))
    server.app = app
    server.run(sockets=[listener])
    sys.stderr.flush()
    os._exit(0)  # the end of the interpreter takes seconds, with JAX imported


def _facts(settings: ServerSettings) -> EngineFacts:
    """Reads what texts need: the tokenizer and the model's config, but no weights."""
    model = ModelConfig.from_directory(settings.model_dir)
    tokenizer = load_tokenizer(settings.model_dir)
    grammars = Grammars(tokenizer, model.vocab_size, sorted(model.eos_token_ids))
    facts: Any = SimpleNamespace(
        tokenizer=tokenizer,
        model=model,
        config=settings.engine,
        grammars=grammars,
        max_model_len=longest_sequence(model, settings.engine),
    )
    return facts


def _delta(message: Tokens, prompt: list[int]) -> Delta:
    """Returns the delta that a message carries."""
    end, output = message.end, None
    if end is not None:
        vector = end.prompt_embedding
        output = RequestOutput(
            request_id="",
            adapter=None,
            prompt_token_ids=prompt,
            text=end.text,
            token_ids=end.token_ids,
            finish_reason=end.finish_reason,
            metrics=RequestMetrics(0.0, cached_tokens=end.cached_tokens),
            token_times=[],
            logprobs=end.logprobs,
            prompt_logprobs=end.prompt_logprobs,
            prompt_embedding=None if vector is None else np.frombuffer(vector, "<f4"),
            error=end.error,
        )
    return Delta("", message.token_ids, message.text, output, message.logprobs, message.prompt_logprobs)
