"""The engine: adapter names, prompts and outputs around the core."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from slora_jax.adapters import AdapterInfo, AdapterStore, LoraAdapter, PreparedAdapter
from slora_jax.engine.arrival import (
    chat_ids,
    check_fits,
    each_conversation,
    each_prompt,
    most_tokens,
    one_each,
    prompt_ids,
    require_kind,
)
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.core import EngineCore, Update
from slora_jax.engine.device import Device
from slora_jax.engine.device_executor import DeviceExecutor, DispatchedStep
from slora_jax.engine.interrupts import InterruptHeld, uninterrupted
from slora_jax.engine.outputs import Delta, EngineStats, Prompt, RequestOutput
from slora_jax.engine.placement import Processes, load, place
from slora_jax.engine.programs import keep_compiled_programs
from slora_jax.engine.request_output import RequestOutputs
from slora_jax.engine.sizing import adapter_geometry, longest_sequence
from slora_jax.engine.text import load_tokenizer
from slora_jax.engine.trace import NO_TRACE, Trace
from slora_jax.errors import AdapterError, ConfigError, RequestError
from slora_jax.memory import (
    AdapterResidency,
    EvictionPolicy,
    Evictor,
    Lru,
    PageAllocator,
    PageKind,
    PrefixCache,
    pool_pages,
)
from slora_jax.metrics import FinishReason
from slora_jax.models import ModelConfig, Params
from slora_jax.models.config import model_names
from slora_jax.parallel.mesh import cut
from slora_jax.phases import phase
from slora_jax.scheduling import (
    AdapterUse,
    Fcfs,
    OneAdapter,
    Policy,
    Request,
    RequestMetrics,
    SamplingParams,
    Scheduler,
)

PACKAGE = str(Path(__file__).parents[1])


class Engine:
    """Serves one base model and any number of its LoRA adapters from one unified pool.

    Not thread-safe: one thread calls it, but where "any thread" is said. Use `from_pretrained`, or build it from a
    model in memory.
    """

    def __init__(
        self,
        model: ModelConfig,
        graphdef: nnx.GraphDef,
        params: Params,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        policy: Policy | None = None,
        eviction: EvictionPolicy | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Compiles every step program (with a progress bar) and allocates the pool.

        Args:
          params: as `models.load_model` or `models.init_random` return them; under `lora="merge"` the engine changes
            them in place.
          tokenizer: a `Tokenizer` or a fast Hugging Face one; without one, prompts are token ids and outputs have no
            text.
          policy: order of requests (None: `Fcfs`; under `lora="merge"` `OneAdapter`).
          eviction: order in which idle content leaves the pool (None: `Lru`).
          processes: that serve the model together (`join_processes`); process 0 has the engine, the others each run a
            `Follower`.

        Raises:
          ConfigError: settings and model, or policy, do not fit together; or the processes' settings differ.
        """
        config = _checked(config)
        policy = policy or (OneAdapter() if config.lora == "merge" else Fcfs())
        if config.lora == "merge" and not isinstance(policy, OneAdapter):
            raise ConfigError(
                f"EngineConfig.lora='merge' serves one adapter at a time, but the policy {type(policy).__name__} may "
                "mix them; use OneAdapter"
            )
        keep_compiled_programs(config.compilation_cache_dir)
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = longest_sequence(model, config)
        spec, params = place(model, graphdef, params, config, processes)
        device = (Device if processes is None else processes.device)(spec, params, config)
        self.allocator = PageAllocator(spec.pool.num_pages, config.adapter_pages)
        self.store = AdapterStore(
            adapter_geometry(model, config.page_size, cut(model, config.tensor_parallel_size, config.tp_lora)),
            config.dtype,
            config.host_adapter_bytes,
            config.spill_dir,
            max_lora_rank=config.max_lora_rank,
            max_pages=min(self.allocator.capacity_for(PageKind.ADAPTER), self.allocator.capacity - 1),
        )
        evictor = Evictor(self.allocator, eviction or Lru())
        self.residency = AdapterResidency(evictor, spec.pool.adapter_slots)
        self.prefixes = PrefixCache(evictor, config.page_size) if config.prefix_cache else None
        self.executor = DeviceExecutor(device, self.store, self.residency, keep_logits=config.keep_logits)
        self.scheduler = Scheduler(self.residency, policy, config, self.executor, self.prefixes)
        self.core: EngineCore[DispatchedStep] = EngineCore(self.scheduler, self.executor, time.perf_counter)
        self._outputs = RequestOutputs(self.core, tokenizer, model.vocab_size)
        self._unread: list[Delta] = []  # for the next step to return: of cancelled requests, and of another stream
        self._arrivals = 0

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        tokenizer: Any = None,
        policy: Policy | None = None,
        eviction: EvictionPolicy | None = None,
        processes: Processes | None = None,
    ) -> Engine:
        """Loads a Hugging Face directory or a GGUF file: weights, and the tokenizer if one is there and none is given.

        Raises:
          UnsupportedModelError, CheckpointError: see `models.load_model`.
        """
        config = _checked(EngineConfig() if config is None else config)
        if tokenizer is None:
            with phase("tokenizer"):
                tokenizer = load_tokenizer(Path(model_dir))
        with phase("weights"):
            model, graphdef, params = load(model_dir, config)
        engine = cls(
            model, graphdef, params, config, tokenizer=tokenizer, policy=policy, eviction=eviction, processes=processes
        )
        engine.store.base_names = model_names(model_dir)
        return engine

    # Adapters

    @uninterrupted
    def load_adapter(self, name: str, adapter: str | Path | LoraAdapter) -> AdapterInfo:
        """Registers a PEFT directory (or an adapter in memory) under `name`, in host memory. A name that is in use gets
        the new content; requests under way keep the old.

        Raises:
          AdapterError: it cannot be used, or is too large for this engine; nothing was changed.
        """
        return self.publish_adapter(self.prepare_adapter(name, adapter))

    def prepare_adapter(self, name: str, adapter: str | Path | LoraAdapter) -> PreparedAdapter:
        """All of `load_adapter` that takes time, on any thread. The store keeps the content until `publish_adapter` or
        `discard_adapter` is given the result. Raises AdapterError as `load_adapter`."""
        _require_name(name)
        if not isinstance(adapter, str | Path | LoraAdapter):
            raise AdapterError(f"adapter={adapter!r}: must be a PEFT directory or a LoraAdapter")
        return self.store.prepare(name, adapter)

    @uninterrupted
    def publish_adapter(self, prepared: PreparedAdapter) -> AdapterInfo:
        """The rest of `load_adapter`, in microseconds. Raises AdapterError if it was published or discarded before."""
        name = prepared.info.name
        old = self.store.resolve(name) if self.store.has(name) else None
        info = self.store.publish(prepared)
        self._drop_if_unnamed(old)
        return info

    def discard_adapter(self, prepared: PreparedAdapter) -> None:
        """Lets go of what will not be published; on any thread. Raises AdapterError as `publish_adapter`."""
        self.store.discard(prepared)

    def load_adapters(self, root: str | Path) -> list[AdapterInfo]:
        """Registers every PEFT directory in `root` under its folder's name, with a progress bar. A bad one is reported
        by a warning and skipped."""
        old = {info.digest for info in self.store.infos()}
        report = self.store.load_directory(root, progress=self.config.progress)
        for name, error in report.errors:
            warnings.warn(f"adapter {name!r} skipped: {error}", stacklevel=2)
        for digest in old:
            self._drop_if_unnamed(digest)
        return report.infos

    @uninterrupted
    def unload_adapter(self, name: str) -> bool:
        """Forgets a name. Its content leaves host memory and the pool at once, unless another name points to it or
        requests under way use it; then it goes with the last of these, and with it the prefixes computed under it.
        Returns whether it is gone.

        Raises:
          AdapterError: no adapter has this name.
        """
        _require_name(name)
        digest = self.store.resolve(name)
        self.store.remove(name)
        return self._drop_if_unnamed(digest) and not self.store.holds(digest)

    def adapters(self) -> list[AdapterInfo]:
        """All registered adapters."""
        return self.store.infos()

    # Requests

    @uninterrupted
    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        request_id: str | None = None,
        tenant: str = "",
    ) -> str:
        """Queues a request and returns its id. It runs as `step` is called. `tenant` is charged for it under a
        fair-share policy: by default its adapter. If `max_tokens` is more than `max_model_len` leaves beside the
        prompt, the answer ends there, and a warning says so.

        Raises:
          RequestError: it can never run: empty or too long prompt, token ids outside the vocabulary, more pages than
            the pool has (the message has the arithmetic), an id in use.
          AdapterError: no adapter has this name.
        """
        require_kind("params", params, SamplingParams)
        require_kind("adapter", adapter, str)
        params = params or SamplingParams()
        ids = prompt_ids(prompt, self.tokenizer, self.model.vocab_size, self.max_model_len)
        if request_id is None:
            numbers = itertools.count(self._arrivals)
            request_id = next(name for n in numbers if (name := f"request-{n}") not in self._outputs)
        if request_id in self._outputs:
            raise RequestError(f"request_id={request_id!r} is in use by an unfinished request")
        room = self.max_model_len - len(ids)
        if params.max_tokens is not None and params.max_tokens > room:
            warnings.warn(
                f"max_tokens={params.max_tokens}: max_model_len={self.max_model_len} leaves room for {room} beside the "
                f"prompt's {len(ids)}; the answer ends there",
                skip_file_prefixes=(PACKAGE,),
            )
        use = self._use(adapter)
        if params.max_tokens is None:
            fits = most_tokens(self.config.page_size, use, self.allocator) - len(ids)
            max_new = max(1, min(room, fits))
        else:
            max_new = min(params.max_tokens, room)
        check_fits(len(ids), max_new, self.config.page_size, use, self.allocator)
        request = Request(
            id=request_id,
            number=self._arrivals,
            prompt=ids,
            params=params,
            seed=params.seed if params.seed is not None else (self.config.seed * 0x9E3779B1 + self._arrivals) % 2**32,
            max_new=max_new,
            adapter=use,
            metrics=RequestMetrics(arrival=self.core.clock()),
            tenant=tenant or adapter or "",
            stop_token_ids=frozenset(params.stop_token_ids or ())
            | frozenset(() if params.ignore_eos else self.model.eos_token_ids),
        )
        self._arrivals += 1
        self._outputs.open(request, adapter)
        if use is not None:
            self.store.acquire(use.digest)
        self.core.add(request)
        return request_id

    @uninterrupted
    def cancel(self, request_id: str) -> bool:
        """Ends a request now; its pages are free when this returns, and the next `step` reports it. Returns whether
        there was such a request."""
        request = self.core.requests.get(request_id)
        if request is None:
            return False
        self.core.finish(request, FinishReason.CANCELLED)
        self._unread += self._deltas([Update(request, ended=True)])
        return True

    def longest_request(self) -> int:
        """Most tokens of prompt and output that `max_model_len` and the pool have room for, without an adapter."""
        return min(self.max_model_len, most_tokens(self.config.page_size, None, self.allocator))

    def has_work(self) -> bool:
        """Returns whether `step` has anything left to do or to report."""
        return self.core.has_work or bool(self._unread)

    def step(self) -> list[Delta]:
        """Plans and dispatches one step, then reads the results of the step before. Returns the news of each request.

        Ctrl-C takes effect after the step; its deltas are then returned by the next one.
        """
        counters = self.core.counters
        with InterruptHeld() as interrupt, self.core.trace.step():
            start, launch_seconds = time.thread_time(), counters.launch_seconds
            updates = self.core.step(may_wait=not self._unread)
            with self.core.trace.span("outputs"):
                deltas = self._deltas(updates)
            counters.host_seconds += time.thread_time() - start - (counters.launch_seconds - launch_seconds)
        deltas, self._unread = self._unread + deltas, []
        if interrupt.came:
            self._unread = deltas
            raise KeyboardInterrupt
        return deltas

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        tenants: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Runs all prompts to their end, batched as they fit, and returns their outputs in order.

        Of a mapping's `input_ids`, and of an array, each row is a prompt. `params`, `adapters` and `tenants` are one
        for all, or a list. Ctrl-C cancels what is unfinished and raises.

        Raises:
          RequestError, AdapterError: as `add_request`, before anything runs.
        """
        if self._outputs.ids:
            unfinished = ", ".join(self._outputs.ids[:8])
            raise RequestError(
                f"generate: {unfinished} unfinished: first run an open stream to its end or close() it, and drain "
                "requests of add_request with step(), or cancel them"
            )
        many = each_prompt(prompts)
        all_params = one_each("params", params, SamplingParams, len(many))
        all_adapters = one_each("adapters", adapters, str, len(many))
        all_tenants = one_each("tenants", tenants, str, len(many))
        ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, one, adapter, tenant in zip(many, all_params, all_adapters, all_tenants, strict=True):
                ids.append(self.add_request(prompt, one, adapter, tenant=tenant))
            bar = tqdm(total=len(ids), desc="generating", unit="req", disable=not self.config.progress or len(ids) < 2)
            with bar:
                while self.has_work():
                    for delta in self.step():
                        if delta.output is not None:
                            outputs[delta.request_id] = delta.output
                            bar.update()
        except BaseException:
            for request_id in self._outputs.ids:  # also one whose id Ctrl-C kept from us
                self.cancel(request_id)
            self._drain()
            raise
        return [outputs[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, in the tokenizer's chat template.

        Args:
          messages: `[{"role": "user", "content": "Hello"}]`, or a list of such conversations.
          params: one for all, or a list. adapters: likewise.
          variables: of the template: `tools=[...]`, say.

        Returns:
          As `generate`.

        Raises:
          RequestError: as `generate`; there is no chat template, or it refuses the messages.
          AdapterError: as `generate`.
        """
        conversations = each_conversation(messages)
        prompts = [chat_ids(one, self.tokenizer, self.max_model_len, **variables) for one in conversations]
        return self.generate(prompts, params, adapters)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[Delta]:
        """Runs one request and yields what each step brings; the last delta carries the whole output. Other requests
        run along, and their deltas wait for the next `step` (or their own stream). Closing the iterator cancels the
        request.

        Raises:
          RequestError, AdapterError: as `add_request`, at the call.
        """
        deltas = self._stream(self.add_request(prompt, params, adapter))
        next(deltas)  # begun, so that closing it cancels the request even if nothing is read
        return deltas

    def stats(self) -> EngineStats:
        """Counters and the state now."""
        return EngineStats(
            **vars(self.core.counters),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            registered_adapters=self.store.stats().registered,
            resident_adapters=len(self.residency),
            pages=pool_pages(self.residency),
            uploads_in_flight=len(self.residency.arriving),
            upload_bytes_in_flight=self.executor.pages_in_flight * self.executor.page_bytes,
        )

    @contextmanager
    def trace(self, path: str | Path | None = None) -> Iterator[Trace]:
        """Records what happens inside the block; writes it to `path` at the end, for the Chrome trace viewer or
        Perfetto. An engine that is not traced pays nothing for it.

        Raises:
          RequestError: a recording is under way.
        """
        if self.core.trace is not NO_TRACE:
            raise RequestError("trace: a recording is under way; one at a time")
        names = {info.digest: info.name for info in self.adapters()}
        self.core.trace = trace = Trace(self.scheduler, self.executor, names, self.executor.page_bytes)
        self.store.observe_disk(trace.disk)
        try:
            yield trace
        finally:
            self.core.trace = NO_TRACE
            self.store.observe_disk(None)
            if path is not None:
                trace.write(path)

    def check(self) -> None:
        """Compares the owners of pages with the allocator; raises `PoolError` on a leak. Cheap enough for each idle
        moment."""
        self.core.check()

    def close(self) -> None:
        """Cancels what runs, stops the store's thread and removes its temporary files; other processes' followers
        return."""
        for request_id in self._outputs.ids:
            self.cancel(request_id)
        try:
            self._drain()
        finally:
            self.store.close()
            self.executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside a step

    def _deltas(self, updates: Sequence[Update[DispatchedStep]]) -> list[Delta]:
        """News for clients. Adapters of requests that have ended are released."""
        deltas = []
        for update in updates:
            try:
                delta = self._outputs.delta(update)
            except Exception as error:  # noqa: BLE001  one request must not disturb the others
                delta = self._outputs.fail(update.request, error)
            if delta is None:
                continue
            deltas.append(delta)
            if delta.output is not None and update.request.adapter is not None:
                self.store.release(update.request.adapter.digest)
                self._drop_if_unnamed(update.request.adapter.digest)
        return deltas

    def _drain(self) -> None:
        while self.has_work() and not self.executor.is_lost:
            self.step()
        if self.executor.is_lost:
            self._deltas(self.core.take_updates())

    def _stream(self, request_id: str) -> Iterator[Delta]:
        try:
            yield Delta(request_id, [], "")  # taken by `stream`
            while request_id in self._outputs or any(delta.request_id == request_id for delta in self._unread):
                deltas = self.step()
                self._unread += [delta for delta in deltas if delta.request_id != request_id]
                for delta in deltas:
                    if delta.request_id == request_id:
                        yield delta
        finally:
            self.cancel(request_id)

    def _use(self, adapter: str | None) -> AdapterUse | None:
        if adapter is None:
            return None
        info = self.store.info(adapter)
        if self.config.lora == "off":
            return None
        return AdapterUse(adapter, info.digest, np.asarray(info.ranks, np.int32), info.num_pages)

    def _drop_if_unnamed(self, digest: str | None) -> bool:
        """Frees the pool pages of content that no name points to any more, and those of prefixes computed under it,
        unless requests use them or wait for them; then they go with the last of these. Whether the adapter is gone."""
        if digest is None or self.store.is_named(digest) or digest in self.scheduler.waiting.by_adapter:
            return False
        if self.prefixes is not None:
            self.prefixes.drop(digest)
        return self.residency.drop(digest)


def _checked(config: Any) -> EngineConfig:
    """The settings, with their dtype decided. Raises ConfigError if they are of another type."""
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config={config!r}: must be an EngineConfig; write EngineConfig(**config)")
    return config.with_dtype()


def _require_name(name: Any) -> None:
    """Raises AdapterError unless `name` can name an adapter."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name={name!r}: must be a string, and not empty")
