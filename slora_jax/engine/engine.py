"""The engine: requests in, tokens out. `step()` is schedule, dispatch, read back the step before."""

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
from slora_jax.engine.interrupts import InterruptHeld, uninterrupted
from slora_jax.engine.outputs import Delta, EngineStats, Prompt, RequestOutput
from slora_jax.engine.programs import keep_compiled_programs
from slora_jax.engine.progress import Progress
from slora_jax.engine.requests import Requests
from slora_jax.engine.runner import InFlight, Runner, adapter_geometry, load, longest_sequence
from slora_jax.engine.text import load_tokenizer
from slora_jax.engine.trace import NoTrace, Trace
from slora_jax.engine.uploads import AdapterUploads
from slora_jax.errors import AdapterError, ConfigError, RequestError
from slora_jax.memory import (
    AdapterResidency,
    EvictionPolicy,
    Evictor,
    Lru,
    PageAllocator,
    PageKind,
    PrefixCache,
)
from slora_jax.memory.prefix import PrefixCounters
from slora_jax.models import ModelConfig, Params
from slora_jax.models.config import model_names
from slora_jax.parallel.mesh import cut
from slora_jax.parallel.processes import ProcessGroup
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
    SchedulerLimits,
    StepPlan,
)

NO_TRACE = NoTrace()
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
        processes: ProcessGroup | None = None,
    ) -> None:
        """Compiles every step program (with a progress bar) and allocates the pool.

        Args:
          params: as `models.load_model` or `models.init_random` return them; under `lora="merge"` they are the engine's
            from now on, who changes them in place.
          tokenizer: a `Tokenizer` or a fast Hugging Face one; without one, prompts are token ids and outputs have no
            text.
          policy: who comes first (None: `Fcfs`; under `lora="merge"` `OneAdapter`).
          eviction: what idle content leaves the pool first (None: `Lru`).
          processes: those that serve the model together (`join_processes`); the engine is process 0's, the others each
            run a `Follower`.

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
        self._runner = Runner(model, graphdef, params, config, processes)
        self.allocator = PageAllocator(self._runner.shape.num_pages, config.adapter_pages)
        self.store = AdapterStore(
            adapter_geometry(model, config.page_size, cut(model, config.tp, config.tp_lora)),
            config.dtype,
            config.host_adapter_bytes,
            config.spill_dir,
            max_lora_rank=config.max_rank,
            max_pages=min(self.allocator.capacity_for(PageKind.ADAPTER), self.allocator.capacity - 1),
        )
        evictor = Evictor(self.allocator, eviction or Lru())
        self.residency = AdapterResidency(evictor, self._runner.shape.adapter_slots)
        self.prefixes = PrefixCache(evictor, config.page_size) if config.prefix_cache else None
        limits = SchedulerLimits(
            config.max_seqs,
            config.max_tokens_per_step,
            config.page_size,
            config.admission,
            prefetch=config.prefetch,
            upload_pages=config.upload_pages_per_step,
        )
        self._uploads = AdapterUploads(
            self.store, self.residency, self._runner, lambda digest, why: self._requests.end_waiting(digest, why)
        )
        self.scheduler = Scheduler(self.residency, policy, limits, self._uploads.state, self.prefixes)
        self._requests = Requests(self.scheduler, self.store, self._drop_if_unnamed)
        self._in_flight: InFlight | None = None
        self._trace = NO_TRACE
        self._arrivals = 0
        self._steps = self._computed = 0
        self._host_seconds = 0.0

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        tokenizer: Any = None,
        policy: Policy | None = None,
        eviction: EvictionPolicy | None = None,
        processes: ProcessGroup | None = None,
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
        """Queues a request and returns its id. It runs as `step` is called. `tenant` is who is charged for it under a
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
            request_id = next(name for n in numbers if (name := f"request-{n}") not in self._requests.progress)
        if request_id in self._requests.progress:
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
            metrics=RequestMetrics(arrival=time.perf_counter()),
            tenant=tenant or adapter or "",
        )
        self._arrivals += 1
        self._requests.add(Progress(request, adapter, self.tokenizer, self.model))
        return request_id

    @uninterrupted
    def cancel(self, request_id: str) -> bool:
        """Ends a request now; its pages are free when this returns, and the next `step` reports it. Returns whether
        there was such a request."""
        return self._requests.cancel(request_id)

    def longest_request(self) -> int:
        """Most tokens of prompt and output that `max_model_len` and the pool have room for, without an adapter."""
        return min(self.max_model_len, most_tokens(self.config.page_size, None, self.allocator))

    def has_work(self) -> bool:
        """Whether `step` has anything left to do or to report."""
        return self.scheduler.has_work() or self._in_flight is not None or bool(self._requests.unread)

    def step(self) -> list[Delta]:
        """Plans and dispatches one step, then reads the results of the step before. Returns what came, per request.

        Ctrl-C takes effect after the step; what the step brought is returned by the next one.
        """
        with InterruptHeld() as interrupt, self._trace.step(self):
            deltas = self._step()
        if interrupt.came:
            self._requests.unread = deltas + self._requests.unread
            raise KeyboardInterrupt
        return deltas

    def _step(self) -> list[Delta]:
        cpu_start = time.thread_time()
        self._uploads.land(self._trace)
        plan = self._plan()
        while not plan.sequences and self._in_flight is None and self._runner.has_staged:
            self._uploads.land(self._trace, wait=True)  # no step is disturbed, and someone waits for just this
            plan = self._plan()
        dispatched = self._dispatch(plan) if plan.sequences else None
        before, self._in_flight = self._in_flight, dispatched
        if before is None and self._in_flight is None and self.scheduler.waiting and not self._requests.unread:
            self._uploads.wait_for_disk(self.scheduler.waiting[0].adapter)
        deltas = self._requests.take()
        if before is not None:
            with self._trace.span("wait for device"):
                tokens = self._runner.read(before)
            self._trace.tokens_read(before)
            with self._trace.span("hand out tokens"):
                deltas += self._requests.read(before, tokens, time.perf_counter())
        self._host_seconds += time.thread_time() - cpu_start
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
        if self._requests.progress:
            unfinished = ", ".join(list(self._requests.progress)[:8])
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
            for request_id in list(self._requests.progress):  # also one whose id Ctrl-C kept from us
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
        counters, evictor = self.residency.counters, self.residency.evictor
        prefixes = PrefixCounters() if self.prefixes is None else self.prefixes.counters
        return EngineStats(
            steps=self._steps,
            tokens_computed=self._computed,
            tokens_generated=self._requests.generated,
            preemptions=self.scheduler.preemptions,
            aborts=self.scheduler.aborts,
            prompt_tokens=self.scheduler.prompt_tokens,
            prefix_hit_tokens=prefixes.hits * self.config.page_size,
            prefix_evictions=prefixes.evictions,
            adapter_loads=counters.loads,
            adapter_evictions=counters.evictions,
            adapter_hits=counters.hits,
            prefetch_hits=counters.prefetch_hits,
            prefetches_wasted=counters.wasted,
            uploads_in_flight=len(self.residency.arriving),
            upload_bytes_in_flight=self.residency.pages_in_flight * self._runner.shape.page_bytes,
            upload_bytes=self._uploads.pages * self._runner.shape.page_bytes,
            adapter_merges=self._runner.merges,
            resident_adapters=len(self.residency),
            registered_adapters=self.store.stats().registered,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages={
                "free": self.allocator.num_free,
                "kv": self.allocator.count(PageKind.KV),
                "prefix": self.allocator.count(PageKind.PREFIX),
                "adapter": self.allocator.count(PageKind.ADAPTER),
            },
            idle_prefix_pages=evictor.pages(PageKind.PREFIX),
            idle_adapter_pages=evictor.pages(PageKind.ADAPTER),
            host_seconds=self._host_seconds - self._runner.launch_seconds,
            launch_seconds=self._runner.launch_seconds,
        )

    @contextmanager
    def trace(self, path: str | Path | None = None) -> Iterator[Trace]:
        """Records what happens inside the block; writes it to `path` at the end, for the Chrome trace viewer or
        Perfetto. An engine that is not traced pays nothing for it.

        Raises:
          RequestError: a recording is under way.
        """
        if self._trace is not NO_TRACE:
            raise RequestError("trace: a recording is under way; one at a time")
        self._trace = trace = Trace(self)
        self.store.observe_disk(trace.disk)
        try:
            yield trace
        finally:
            self._trace = NO_TRACE
            self.store.observe_disk(None)
            if path is not None:
                trace.write(path)

    def check(self) -> None:
        """Compares every book with every other; raises `PoolError` on a leak. Cheap enough for each idle moment."""
        self.scheduler.check()

    def close(self) -> None:
        """Cancels what runs, stops the store's thread and removes its temporary files; other processes' followers
        return."""
        for request_id in list(self._requests.progress):
            self.cancel(request_id)
        try:
            self._drain()
        finally:
            self.store.close()
            self._runner.worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside a step

    def _plan(self) -> StepPlan:
        """Plans a step, begins the copies that go beside it, and reports whom it gave up."""
        with self._trace.span("schedule"):
            plan = self.scheduler.schedule(time.perf_counter())
            self._trace.planned(plan, self)
        try:
            self._uploads.stage(plan, self._trace)
        except BaseException as error:
            self._abandon(plan, f"the step failed: {error!r}")
            raise
        self._requests.end_aborted(plan)
        self._uploads.end_lost()
        return plan

    def _dispatch(self, plan: StepPlan) -> InFlight:
        try:
            self._uploads.upload(plan, self._trace)
            with self._trace.span("dispatch"):
                step = self._runner.dispatch(plan)
            self._trace.dispatched(step, plan)
        except BaseException as error:
            self._abandon(plan, f"the step failed: {error!r}")
            raise
        self._steps += 1
        self._computed += plan.num_tokens
        return step

    def _abandon(self, plan: StepPlan, error: str) -> None:
        """After a failure: ends the plan's requests; forgets what may not have reached the pool."""
        self.scheduler.abandon(plan, lambda request: self._requests.end_failed(request, error))
        self._uploads.abandon(plan)

    def _drain(self) -> None:
        while self.has_work() and not self._runner.worker.is_lost:
            self.step()

    def _stream(self, request_id: str) -> Iterator[Delta]:
        try:
            yield Delta(request_id, [], "")  # taken by `stream`
            while self._requests.has(request_id):
                deltas = self.step()
                self._requests.unread += [delta for delta in deltas if delta.request_id != request_id]
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
