"""The service behind the endpoints: the engine's loop, adapters, limits, metrics."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import cached_property
from typing import Any, Protocol

from fastapi import Request

from slora_jax.adapters import Tier
from slora_jax.engine import Engine, RequestOutput
from slora_jax.engine.arrival import prompt_ids
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.structured import Grammars
from slora_jax.errors import RequestError
from slora_jax.models import ModelConfig
from slora_jax.scheduling import SamplingParams
from slora_jax.serving.adapters import Adapters
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.health import Health
from slora_jax.serving.http.errors import ApiError, incomplete, stopping
from slora_jax.serving.http.limits import Shares
from slora_jax.serving.http.token_text import TokenText
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.observability.live_state import LiveState
from slora_jax.serving.observability.prometheus import ServerMetrics
from slora_jax.serving.settings import ServerSettings
from slora_jax.serving.tinker.training import Training

AnyExitStack = ExitStack | AsyncExitStack

TEXT_THREADS = 4
"""Threads that tokenize and fill in chat templates; a long text delays only other texts."""


class EngineFacts(Protocol):
    """The constant part of an `Engine` that requests and answers need."""

    tokenizer: Any
    model: ModelConfig
    config: EngineConfig
    grammars: Grammars
    max_model_len: int


class HttpMetrics(Protocol):
    """Counts of HTTP requests (`ServerMetrics`)."""

    def http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Counts an answer."""

    def refused(self, reason: str) -> None:
        """Counts a request that was refused before it came to the engine."""


class GeneratingService(ABC):
    """The service of the endpoints that read and generate text; one per process."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")

    @property
    @abstractmethod
    def engine(self) -> EngineFacts:
        """The engine's facts. Raises ApiError 503 if there is no engine."""

    @property
    @abstractmethod
    def http_metrics(self) -> HttpMetrics:
        """The counts of HTTP requests."""

    @abstractmethod
    async def check_model(self, model: str | None) -> None:
        """Raises UnknownAdapterError, or ApiError of that kind, if there is no such model."""

    @abstractmethod
    async def admit(self, held: AsyncExitStack, client: str, model: str | None, sequences: int) -> str | int | None:
        """Counts a request's sequences until `held` is closed.

        Returns:
          What `start` needs of the admission.

        Raises:
          ApiError: the service accepts no request now, or a limit is reached.
          UnknownAdapterError: there is no such model.
        """

    @abstractmethod
    def start(
        self,
        held: AsyncExitStack,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        admission: Any,
        tenant: str,
        mailbox: Mailbox,
        priority: int = 0,
        *,
        is_streamed: bool = False,
    ) -> None:
        """Starts an admitted request's sequences. Their tokens go to `mailbox`, by index; they end with `held`.

        Args:
          is_streamed: whether the mailbox needs more than the whole outputs.
        """

    @cached_property
    def token_text(self) -> TokenText:
        return TokenText(self.engine.tokenizer)

    async def token_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Returns the prompts' token ids; texts are tokenized in a thread. Raises RequestError."""
        engine = self.engine
        if all(not isinstance(prompt, str) for prompt in prompts):
            return [self.checked(prompt) for prompt in prompts]
        tokenizer, vocab_size, longest = engine.tokenizer, engine.model.vocab_size, engine.max_model_len
        return await self.of_text(lambda: [prompt_ids(one, tokenizer, vocab_size, longest) for one in prompts])

    async def of_text[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function of texts in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, lambda: function(*args, **kwargs))

    def text(self, prompt: str | list[int]) -> str:
        """Returns a prompt as text. Raises RequestError for invalid token ids, or without a tokenizer."""
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestError("echo: the model directory has no tokenizer, so token ids have no text")
        return tokenizer.decode(self.checked(prompt))

    def checked(self, ids: Any) -> list[int]:
        """Returns the token ids of a prompt. Raises RequestError if they cannot be one."""
        engine = self.engine
        return prompt_ids(ids, None, engine.model.vocab_size, engine.max_model_len)


class Service(GeneratingService):
    """The service in the engine's process, created in the event loop."""

    def __init__(self, settings: ServerSettings, build: Callable[[], Engine]) -> None:
        super().__init__(settings)
        self.started = int(time.time())
        self.shares = Shares(settings.limits, settings.engine.max_num_seqs)
        self.is_draining = False
        self._build = build
        self.metrics = ServerMetrics(
            lambda: self.loop.snapshot, self._tiers, is_registered=self._is_registered
        )  # before the engine, so that its compilations are counted
        self.live = LiveState(settings.base_name, self.metrics)
        self.adapters = Adapters(settings, self.metrics.adapters.forget)
        self.loop = EngineLoop(self._make_engine, self, stall_seconds=settings.stall_seconds)
        self.training = None if settings.train is None else Training(settings, settings.train, self.loop)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts to build the engine, and stops it at the end of the block."""
        self.loop.start()
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._sample())]
        if self.training is not None:
            tasks.append(asyncio.create_task(self.training.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await self.loop.stop()
            self._texts.shutdown(wait=False, cancel_futures=True)
            self.metrics.close()

    async def drain(self) -> None:
        """Rejects new requests; returns when those under way have ended, or failed at the deadline."""
        self.is_draining = True
        self.metrics.set_ready(False)
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.loop.num_unfinished and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.loop.num_unfinished:
            self.loop.fail_all(incomplete())

    @property
    def is_ready(self) -> bool:
        return self.loop.health is Health.READY and not self.is_draining

    def open_for(self, model: str | None) -> str | None:
        """Returns the adapter of a new request; None for the base model.

        Raises:
          ApiError: 503, no request is accepted now.
          UnknownAdapterError: there is no such model.
        """
        if self.is_draining:
            raise stopping()
        self.loop.check_ready()
        return self.adapter_named(model)

    def adapter_named(self, model: str | None) -> str | None:
        """Returns the adapter of `model`, which may be written base:adapter; None for the base model.

        Raises:
          UnknownAdapterError: there is no such model.
        """
        base, store = self.settings.base_name, self.loop.engine.store
        if model is None or model == base:
            return None
        return store.info(model if store.has(model) else model.removeprefix(f"{base}:")).name

    @property
    def engine(self) -> Engine:
        return self.loop.engine

    @property
    def http_metrics(self) -> ServerMetrics:
        return self.metrics

    async def check_model(self, model: str | None) -> None:
        self.adapter_named(model)

    async def admit(self, held: AsyncExitStack, client: str, model: str | None, sequences: int) -> str | None:
        return self.hold(held, client, model, sequences)

    def hold(self, held: AnyExitStack, client: str, model: str | None, sequences: int) -> str | None:
        """Does what `admit` does. Returns the adapter's name; None for the base model."""
        adapter = self.open_for(model)
        held.enter_context(self.shares.hold(client, sequences))
        return adapter

    def start(
        self,
        held: AnyExitStack,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        admission: str | None,
        tenant: str,
        mailbox: Mailbox,
        priority: int = 0,
        *,
        is_streamed: bool = False,
    ) -> None:
        ids = [
            self.loop.submit(prompt, one, admission, tenant, mailbox, index, priority)
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        held.callback(self.loop.cancel, ids)

    # The loop's listener

    def finished(self, output: RequestOutput) -> None:
        self.metrics.finished(output)

    def health_changed(self, health: Health) -> None:
        self.metrics.set_ready(self.is_ready)

    def fault(self, error: BaseException) -> None:
        self.metrics.fault()

    # Internal

    def _make_engine(self) -> Engine:
        engine = self._build()
        self.adapters.register_all(engine)
        if self.training is not None:
            self.training.make_trainer(engine)
        return engine

    async def _watch(self) -> None:
        while self.loop.health is Health.STARTING:
            await asyncio.sleep(0.1)
        if self.settings.watch_seconds:
            await self.adapters.watch(self.loop)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.live.sample(self.loop.snapshot, self._tiers())

    def _tiers(self) -> dict[str, Tier]:
        try:
            return self.loop.engine.store.tiers()
        except ApiError:  # the engine is not built yet, or dead
            return {}

    def _is_registered(self, name: str) -> bool:
        try:
            return self.loop.engine.store.has(name)
        except ApiError:  # the engine has died since the request ended
            return False


def service_of(request: Request) -> Service:
    """Returns the service that received a request."""
    service: Service = request.app.state.service
    return service


def generating_service_of(request: Request) -> GeneratingService:
    """Returns the service that received a request that reads or generates text."""
    service: GeneratingService = request.app.state.service
    return service
