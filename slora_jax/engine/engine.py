"""The engine, which adds adapter names, prompts, text and outputs to the core."""

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

from slora_jax.adapters import AdapterInfo, AdapterStore, BaseGeometry, LoraAdapter, PreparedAdapter
from slora_jax.engine.arrival import (
    activation,
    chat_ids,
    check_bias,
    check_embedding,
    check_fits,
    check_priority,
    each_conversation,
    each_prompt,
    most_tokens,
    one_each,
    prompt_ids,
    require_kind,
)
from slora_jax.engine.base_weights import EngineWeights
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.core import EngineCore, Update
from slora_jax.engine.device import Device
from slora_jax.engine.device_executor import DeviceExecutor, DispatchedStep
from slora_jax.engine.interrupts import InterruptHeld, uninterrupted
from slora_jax.engine.outputs import Delta, EngineStats, Prompt, RequestOutput, embeddings
from slora_jax.engine.placement import Processes, load, place
from slora_jax.engine.programs import keep_compiled_programs
from slora_jax.engine.request_output import RequestOutputs
from slora_jax.engine.sizing import engine_geometry, longest_sequence
from slora_jax.engine.structured import Grammars
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
    StructuredOutputs,
)

PACKAGE = str(Path(__file__).parents[1])


class Engine:
    """Serves one base model and any number of its LoRA adapters from one unified pool.

    Make it with `from_pretrained`, or from a model in memory. All calls must come from one thread, except where "any
    thread" is stated.
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
          params: from `models.load_model` or `models.init_random`. With `lora="merge"` they are changed in place.
          tokenizer: a `Tokenizer` or a fast Hugging Face one. Without it, prompts must be token ids and outputs have no
            text.
          policy: scheduling policy, by default `Fcfs` (with `lora="merge"`, `OneAdapter`).
          eviction: eviction policy, by default `Lru`.
          processes: the group of processes that serve the model (`join_processes`). Process 0 makes the engine, each
            other one a `Follower`.

        Raises:
          ConfigError: settings, model and policy do not fit together, or the processes' settings differ.
        """
        config = _checked(config)
        policy = policy or (OneAdapter() if config.lora == "merge" else Fcfs())
        if config.lora == "merge" and not isinstance(policy, OneAdapter):
            raise ConfigError(
                f"EngineConfig.lora='merge' serves one adapter at a time, but the policy {type(policy).__name__} may "
                "mix them; use OneAdapter"
            )
        if config.lora == "merge" and model.experts is not None:
            raise ConfigError("EngineConfig.lora='merge': a model with experts is not supported; use 'paged'")
        if config.lora == "merge" and model.weights is not None:
            raise ConfigError(
                f"EngineConfig.lora='merge': adapters cannot be merged into weights={model.weights!r}; use 'paged', or "
                "weights of the model's dtype"
            )
        if config.weights not in ("auto", model.weights):
            raise ConfigError(
                f"EngineConfig.weights={config.weights!r}: the model in memory has weights={model.weights!r}; use "
                "'auto', or Engine.from_pretrained, which quantises"
            )
        keep_compiled_programs(config.compilation_cache_dir)
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = longest_sequence(model, config)
        spec, params = place(model, graphdef, params, config, processes)
        device = (Device if processes is None else processes.device)(spec, params, config)
        self.allocator = PageAllocator(spec.pool.num_pages, config.adapter_pages)
        geometry = engine_geometry(model, config)
        self.store = AdapterStore(
            geometry,
            spec.pool.weight_dtype,
            config.host_adapter_bytes,
            config.spill_dir,
            max_lora_rank=config.max_lora_rank,
            max_pages=min(self.allocator.capacity_for(PageKind.ADAPTER), self.allocator.capacity - 1),
            base=None if processes is not None else _weights_of(device, config, geometry),
            extras=config.adapter_extras,
            activated=config.lora != "merge",
        )
        self.store.base_weights = model.weights or config.dtype
        evictor = Evictor(self.allocator, eviction or Lru())
        self.residency = AdapterResidency(evictor, spec.pool.adapter_slots)
        self.prefixes = PrefixCache(evictor, config.page_size) if config.prefix_cache else None
        self.executor = DeviceExecutor(device, self.store, self.residency, keep_logits=config.keep_logits)
        self.scheduler = Scheduler(self.residency, policy, config, self.executor, self.prefixes)
        self.core: EngineCore[DispatchedStep] = EngineCore(self.scheduler, self.executor, time.perf_counter)
        self._outputs = RequestOutputs(self.core, tokenizer, model.vocab_size)
        self.grammars = Grammars(tokenizer, model.vocab_size, sorted(model.eos_token_ids))
        self._unread: list[Delta] = []  # returned by the next step: from cancelled requests and other streams
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
        """Loads a Hugging Face directory or a GGUF file: the weights, and the tokenizer unless one is given.

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
        """Loads a PEFT directory (or an adapter in memory) into host memory under `name`.

        If the name is in use, new requests get the new content; unfinished requests keep the old one.

        Raises:
          AdapterError: the adapter is invalid or too large for this engine; nothing is changed.
        """
        return self.publish_adapter(self.prepare_adapter(name, adapter))

    def prepare_adapter(self, name: str, adapter: str | Path | LoraAdapter) -> PreparedAdapter:
        """Does the slow part of `load_adapter`, on any thread, and raises its errors. The store keeps the content until
        the result is passed to `publish_adapter` or `discard_adapter`."""
        _require_name(name)
        if not isinstance(adapter, str | Path | LoraAdapter):
            raise AdapterError(f"adapter={adapter!r}: must be a PEFT directory or a LoraAdapter")
        return self.store.prepare(name, adapter)

    @uninterrupted
    def publish_adapter(self, prepared: PreparedAdapter) -> AdapterInfo:
        """Does the rest of `load_adapter`, in microseconds. Raises AdapterError if `prepared` was already published or
        discarded."""
        name = prepared.info.name
        old = self.store.resolve(name) if self.store.has(name) else None
        info = self.store.publish(prepared)
        self._drop_if_unnamed(old)
        return info

    def discard_adapter(self, prepared: PreparedAdapter) -> None:
        """Releases an adapter that will not be published, on any thread. Raises as `publish_adapter`."""
        self.store.discard(prepared)

    def load_adapters(self, root: str | Path) -> list[AdapterInfo]:
        """Loads every PEFT directory in `root` under its folder's name. Skips invalid ones with a warning."""
        old = {info.digest for info in self.store.infos()}
        report = self.store.load_directory(root, progress=self.config.progress)
        for name, error in report.errors:
            warnings.warn(f"adapter {name!r} skipped: {error}", stacklevel=2)
        for digest in old:
            self._drop_if_unnamed(digest)
        return report.infos

    @uninterrupted
    def unload_adapter(self, name: str) -> bool:
        """Removes a name. Returns whether its content was freed at once.

        The content leaves host memory and the pool, with the prefixes computed with it, when no other name points to it
        and no unfinished request uses it.

        Raises:
          AdapterError: no adapter has this name.
        """
        _require_name(name)
        digest = self.store.resolve(name)
        self.store.remove(name)
        return self._drop_if_unnamed(digest) and not self.store.holds(digest)

    def adapters(self) -> list[AdapterInfo]:
        """Returns all registered adapters."""
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
        priority: int = 0,
    ) -> str:
        """Queues a request and returns its id. Calls of `step` run it.

        Args:
          params: `max_tokens` is cut, with a warning, to the room that `max_model_len` leaves after the prompt.
          adapter: name of its adapter; None for the base model.
          request_id: id of the request; None assigns one.
          tenant: account charged under a fair-share policy; by default the adapter's name.
          priority: lower numbers come first; must be 0 unless the policy takes priorities (`Priority`).

        Raises:
          RequestError: the prompt is empty, too long, has ids outside the vocabulary, or lacks the invocation tokens of
            an activated LoRA; the request needs more pages than the pool has (the message shows the arithmetic); or the
            id is in use.
          ConfigError: the engine has no `embeddings`, the grammar of `structured_outputs` is invalid, a token of
            `logit_bias` is outside the vocabulary, or the policy takes no priority.
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
                f"prompt's {len(ids)}; the output ends there",
                skip_file_prefixes=(PACKAGE,),
            )
        check_embedding(params, self.config)
        check_bias(params, self.model.vocab_size)
        check_priority(priority, self.scheduler.policy)
        form = params.structured_outputs
        grammar = self.grammars.compile(form) if isinstance(form, StructuredOutputs) else None
        use = self._adapter_use(adapter)
        start = 0 if use is None or adapter is None else activation(ids, self.store.info(adapter))
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
            adapter_start=start,
            metrics=RequestMetrics(arrival=self.core.clock()),
            tenant=tenant or adapter or "",
            grammar=grammar,
            priority=priority,
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
        """Ends an unfinished request and frees its pages; the next `step` reports it. Returns whether it existed."""
        request = self.core.requests.get(request_id)
        if request is None:
            return False
        self.core.finish(request, FinishReason.CANCELLED)
        self._unread += self._deltas([Update(request, ended=True)])
        return True

    def longest_request(self) -> int:
        """Returns the maximum tokens of prompt and output, without an adapter, by `max_model_len` and the pool."""
        return min(self.max_model_len, most_tokens(self.config.page_size, None, self.allocator))

    def has_work(self) -> bool:
        """Returns whether `step` has work to do or deltas to report."""
        return self.core.has_work or bool(self._unread)

    def step(self) -> list[Delta]:
        """Plans and dispatches one step, then reads the previous one. Returns a delta per request with new results.
        Ctrl-C takes effect after the step, and the next step returns its deltas."""
        counters = self.core.counters
        with InterruptHeld() as interrupt, self.core.trace.step():
            start, launch_seconds = time.thread_time(), counters.launch_seconds
            updates = self.core.step(may_wait=not self._unread)
            with self.core.trace.span("outputs"):
                deltas = self._deltas(updates)
            counters.host_seconds += time.thread_time() - start - (counters.launch_seconds - launch_seconds)
        deltas, self._unread = self._unread + deltas, []
        if interrupt.is_pending:
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
        """Runs all prompts to their end and returns their outputs in order. Ctrl-C cancels unfinished requests.

        Args:
          prompts: one or several; each row of an array, or of a mapping's `input_ids`, is a prompt.
          params, adapters, tenants: as in `add_request`; one for all, or a list with one per prompt.

        Raises:
          RequestError, AdapterError: as `add_request`, before any request runs.
        """
        if self._outputs.ids:
            unfinished = ", ".join(self._outputs.ids[:8])
            raise RequestError(
                f"generate: {unfinished} unfinished: first run an open stream to its end or close() it, and finish "
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
            for request_id in self._outputs.ids:  # includes one whose id was lost to Ctrl-C
                self.cancel(request_id)
            self._drain()
            raise
        return [outputs[request_id] for request_id in ids]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | Sequence[str | None] | None = None,
        pooling: str = "last",
        normalize: bool = True,
    ) -> np.ndarray:
        """Returns an embedding of each prompt, float32 `[n, d]`: its pooled hidden states after the final norm.

        Args:
          prompts, adapters: as in `generate`.
          pooling: "mean" over the prompt's tokens, or "last".
          normalize: whether each embedding has length 1.

        Raises:
          ConfigError: the engine was made without `EngineConfig.embeddings`.
          RequestError, AdapterError: as `generate`.
        """
        outputs = self.generate(prompts, SamplingParams(max_tokens=1, prompt_embedding=pooling), adapters)
        return embeddings(outputs, normalize)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answers one or several conversations in the model's chat template. Returns outputs as `generate` does.

        Args:
          messages: `[{"role": "user", "content": "Hello"}]`, or a list of such conversations.
          params, adapters: one for all, or a list with one per conversation.
          variables: variables of the template, for example `tools=[...]`.

        Raises:
          RequestError: as `generate`, or there is no chat template, or it rejects the messages.
          AdapterError: as `generate`.
        """
        conversations = each_conversation(messages)
        prompts = [chat_ids(one, self.tokenizer, self.max_model_len, **variables) for one in conversations]
        return self.generate(prompts, params, adapters)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[Delta]:
        """Runs one request and yields its new tokens after each step; the last delta has the whole output.

        Other requests run too, and their deltas are kept for the next `step` or their own stream. Closing the iterator
        cancels the request.

        Raises:
          RequestError, AdapterError: as `add_request`, at the call.
        """
        deltas = self._stream(self.add_request(prompt, params, adapter))
        next(deltas)  # start the generator, so that closing it always cancels the request
        return deltas

    def stats(self) -> EngineStats:
        """Returns the counters and the current state."""
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
        """Records a trace inside the block. Without it, tracing costs nothing.

        Args:
          path: file written at the end of the block, for the Chrome trace viewer or Perfetto.

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
        """Checks page ownership against the allocator. Raises `PoolError` on a leak. Cheap enough to call when idle."""
        self.core.check()

    def close(self) -> None:
        """Cancels unfinished requests, stops the store's thread, removes its temporary files and ends the followers."""
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
        """Turns the core's updates into deltas, and releases the adapters of finished requests."""
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
            yield Delta(request_id, [], "")  # consumed by `stream`
            while request_id in self._outputs or any(delta.request_id == request_id for delta in self._unread):
                deltas = self.step()
                self._unread += [delta for delta in deltas if delta.request_id != request_id]
                for delta in deltas:
                    if delta.request_id == request_id:
                        yield delta
        finally:
            self.cancel(request_id)

    def _adapter_use(self, adapter: str | None) -> AdapterUse | None:
        if adapter is None:
            return None
        info = self.store.info(adapter)
        if self.config.lora == "off":
            return None
        return AdapterUse(adapter, info.digest, np.array(info.layout_ranks, np.int32), info.num_pages)

    def _drop_if_unnamed(self, digest: str | None) -> bool:
        """Frees the pool pages of unnamed content and of the prefixes computed with it, unless requests need them (then
        it is called again when these end). Returns whether the adapter has left the pool."""
        if digest is None or self.store.is_named(digest) or digest in self.scheduler.waiting.by_adapter:
            return False
        if self.prefixes is not None:
            self.prefixes.drop(digest)
        return self.residency.drop(digest)


def _checked(config: Any) -> EngineConfig:
    """Returns the settings with their dtype resolved. Raises ConfigError if `config` has another type."""
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config={config!r}: must be an EngineConfig; write EngineConfig(**config)")
    return config.with_dtype()


def _weights_of(device: Device, config: EngineConfig, geometry: BaseGeometry) -> EngineWeights:
    return EngineWeights(lambda: device.params, geometry, config.max_lora_rank, norms=config.adapter_extras)


def _require_name(name: Any) -> None:
    """Raises AdapterError unless `name` is a valid adapter name."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name={name!r}: must be a string, and not empty")
