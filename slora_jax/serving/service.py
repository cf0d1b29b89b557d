"""What the endpoints share: the engine's loop, who may do what, which adapters there are, what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request

from slora_jax.adapters import Tier
from slora_jax.engine import Engine, RequestOutput
from slora_jax.engine.arrival import prompt_ids
from slora_jax.errors import RequestError
from slora_jax.serving.access import Access, Client, Right
from slora_jax.serving.adapters import Adapters
from slora_jax.serving.engine_loop import EngineLoop, Health
from slora_jax.serving.errors import ApiError, unavailable
from slora_jax.serving.limits import Shares
from slora_jax.serving.metrics import ServerMetrics
from slora_jax.serving.observation import AdapterUsage
from slora_jax.serving.settings import ServerSettings
from slora_jax.serving.state import LiveState
from slora_jax.serving.token_text import TokenText

TEXT_THREADS = 4
"""That tokenize and fill in chat templates; long texts hold up other texts, and nothing else."""


class Service:
    """Made once a process, in the event loop."""

    def __init__(self, settings: ServerSettings, build: Callable[[], Engine]) -> None:
        self.settings = settings
        self.started = int(time.time())
        self.access = Access(settings.api_keys)
        self.adapters = Adapters(settings, self._gone)
        self.shares = Shares(settings.limits, settings.engine.max_num_seqs)
        self.is_draining = False
        self.usage = AdapterUsage(self._is_registered)
        self._build = build
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._token_text: TokenText | None = None
        self.live = LiveState(settings.base_name)
        self.metrics = ServerMetrics(
            lambda: self.loop.snapshot, self._tiers, is_registered=self._is_registered
        )  # before the engine, so that its compilations are counted
        self.loop = EngineLoop(self._make_engine, self, stall_seconds=settings.stall_seconds)

    @asynccontextmanager
    async def running(self) -> Any:
        """Builds the engine, meanwhile and until the end of the block."""
        self.loop.start()
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._sample())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await self.loop.stop()
            self._texts.shutdown(wait=False, cancel_futures=True)
            self.metrics.close()

    async def drain(self) -> None:
        """Takes no more requests; returns when those under way have ended, or failed at the deadline."""
        self.is_draining = True
        self.metrics.set_ready(False)
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.loop.num_unfinished and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.loop.num_unfinished:
            self.loop.fail_all(unavailable("the service was stopped before the answer was complete", code="stopping"))

    @property
    def is_ready(self) -> bool:
        return self.loop.health is Health.READY and not self.is_draining

    def open_for(self, model: str | None) -> str | None:
        """The adapter of a new request: None for the base model.

        Raises:
          ApiError: 503, no request is taken now.
          UnknownAdapterError: there is no such model.
        """
        if self.is_draining:
            raise unavailable("the service is stopping", code="stopping", retry_after=10)
        self.loop.check_ready()
        return self.adapter_named(model)

    def adapter_named(self, model: str | None) -> str | None:
        """Raises UnknownAdapterError if there is no such model."""
        if model is None or model == self.settings.base_name:
            return None
        return self.loop.engine.store.info(model).name

    @property
    def token_text(self) -> TokenText:
        if self._token_text is None:
            self._token_text = TokenText(self.loop.engine.tokenizer)
        return self._token_text

    async def token_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The prompts' tokens; texts are tokenized beside the event loop. Raises RequestError."""
        engine = self.loop.engine
        if all(not isinstance(prompt, str) for prompt in prompts):
            return [self.checked(prompt) for prompt in prompts]
        tokenizer, vocab_size, longest = engine.tokenizer, engine.model.vocab_size, engine.max_model_len
        return await self.of_text(lambda: [prompt_ids(one, tokenizer, vocab_size, longest) for one in prompts])

    async def of_text[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls what works on texts beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, partial(function, *args, **kwargs))

    def text(self, prompt: str | list[int]) -> str:
        """A prompt as text. Raises RequestError for token ids that cannot be one, or without a tokenizer."""
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.loop.engine.tokenizer
        if tokenizer is None:
            raise RequestError("echo: the model directory has no tokenizer, so token ids have no text")
        return tokenizer.decode(self.checked(prompt))

    def checked(self, ids: Any) -> list[int]:
        """Token ids that can be a prompt. Raises RequestError."""
        engine = self.loop.engine
        return prompt_ids(ids, None, engine.model.vocab_size, engine.max_model_len)

    def _make_engine(self) -> Engine:
        engine = self._build()
        self.adapters.register_all(engine)
        return engine

    async def _watch(self) -> None:
        while self.loop.health is Health.STARTING:
            await asyncio.sleep(0.1)
        if self.settings.watch_seconds:
            await self.adapters.watch(self.loop)

    # What the engine's loop tells

    def finished(self, output: RequestOutput) -> None:
        self.usage.finished(output)
        self.metrics.finished(output)
        self.live.finished(output)

    def health_changed(self, health: Health) -> None:
        self.metrics.set_ready(self.is_ready)

    def fault(self, error: BaseException) -> None:
        self.metrics.fault()

    # Inside

    def _gone(self, adapter: str) -> None:
        self.usage.forget(adapter)
        self.metrics.forget(adapter)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.live.sample(self.loop.snapshot, self._tiers())

    def _tiers(self) -> dict[str, Tier]:
        try:
            return self.loop.engine.store.tiers()
        except ApiError:  # it is not there yet, or no more
            return {}

    def _is_registered(self, name: str) -> bool:
        try:
            return self.loop.engine.store.has(name)
        except ApiError:  # it has died since the request ended
            return False


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


def _may(right: Right | None) -> Callable[[Request], Client]:
    def check(request: Request) -> Client:
        return service_of(request).access.check(request, right)

    return check


MayServe = Annotated[Client, Depends(_may("serve"))]
"""Who sent a request, which may generate."""
MayManage = Annotated[Client, Depends(_may("manage"))]
"""Who sent a request, which may load and unload adapters."""
MayLook = Annotated[Client, Depends(_may(None))]
"""Who sent a request, with any right."""
