"""Cases of whole decode steps: the engine's own program, base only and with adapters on all linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pallas_kernels.bench.adapters import Adapters, resident, spread
from pallas_kernels.bench.case import Case, Dispatch, Program, Section, System
from pallas_kernels.bench.pools import random_array, random_pages, release
from pallas_kernels.bench.size import Size
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.lora.roofline import layer_work
from pallas_kernels.paged_attention.roofline import attention_work
from pallas_kernels.pool_write.roofline import write_kv_work
from pallas_kernels.roofline import Work
from slora_jax.engine.batch import BatchLayout, Bucket, build_metadata
from slora_jax.engine.step import StepSpec, make_step, step_shapes
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, abstract_decoder, init_random
from slora_jax.scheduling import Request, SamplingParams, StepPlan
from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.request import AdapterUse, RequestMetrics

ITEMSIZE = 2
"""bfloat16."""


@dataclass(frozen=True)
class Grid:
    """steps: sequences of a step, and the numbers of distinct adapters that they are measured with. context: tokens
    before each. rank: of every projection of every adapter. max_rank: that programs are compiled for."""

    steps: tuple[tuple[int, tuple[int, ...]], ...]
    context: int
    rank: int
    max_rank: int


FULL = Grid(steps=((64, (1, 16, 64)), (256, (1, 16, 64, 256))), context=512, rank=16, max_rank=64)
MINIATURE = Grid(steps=((4, (1, 2)),), context=12, rank=8, max_rank=8)


@dataclass(frozen=True)
class Server:
    """What the steps of one batch share: the engine's program, and a pool that holds every sequence and adapter."""

    size: Size
    batch: int
    adapters: int
    grid: Grid
    seed: int

    @cached_property
    def spec(self) -> StepSpec:
        model, size = self.size.model, self.size
        config = ModelConfig.from_dict(model.config())
        graphdef, params = abstract_decoder(config, "bfloat16")
        pages = self.resident
        pool = PoolShape(
            num_layers=model.num_layers,
            num_pages=1
            + self.batch * self.sequence_pages
            + int(model.layout(size.page_size).num_pages(pages.ranks).sum()),
            page_size=size.page_size,
            width=model.width,
            dtype="bfloat16",
            adapter_slots=self.adapters,
            max_adapter_pages=pages.pages.shape[1],
        )
        return StepSpec(
            model=config,
            graphdef=graphdef,
            params=params,
            pool=pool,
            max_num_seqs=self.batch,
            max_pages_per_seq=ceil_div(model.max_tokens, size.page_size),
            max_rank=self.grid.max_rank,
        )

    @property
    def sequence_pages(self) -> int:
        return ceil_div(self.grid.context + 1, self.size.page_size)

    @cached_property
    def resident(self) -> Adapters:
        """All adapters, on the first pages of the pool in random order; sequences lie behind them."""
        layout = self.size.model.layout(self.size.page_size)
        pages = self.adapters * int(layout.num_pages(np.full(7, self.grid.rank)))
        return resident(
            layout, self.grid.rank, slots=self.adapters, max_rank=self.grid.max_rank, pool_pages=1 + pages,
            rng=np.random.default_rng(self.seed),
        )  # fmt: skip

    @cached_property
    def page_table(self) -> np.ndarray:
        """int32 `[batch, sequence_pages]`."""
        count = self.batch * self.sequence_pages
        first = self.spec.pool.num_pages - 1 - count
        ids = first + random_pages(count, count + 1, np.random.default_rng(self.seed))
        return ids.reshape(self.batch, self.sequence_pages)

    @cached_property
    def layout(self) -> BatchLayout:
        return self.spec.layout(Bucket(tokens=self.batch, seqs=self.batch, decode=True))

    def metadata(self, adapters: int) -> np.ndarray:
        """A step in which every sequence decodes one token, spread over `adapters` adapters (0: the base model)."""
        slots = (
            [slot for slot, rows in enumerate(spread(self.batch, adapters)) for _ in range(rows)] if adapters else []
        )
        slots += [-1] * (self.batch - len(slots))
        uses = [AdapterUse(str(slot), str(slot), ranks, 0) for slot, ranks in enumerate(self.resident.ranks)]
        context = self.grid.context
        requests = [
            Request(
                id=str(i), number=i, prompt=[0] * context, params=SamplingParams(), seed=0, max_new=1, num_sampled=1,
                adapter=None if slot < 0 else uses[slot], metrics=RequestMetrics(0.0), slot=i, adapter_slot=slot,
                pages=self.page_table[i].tolist(),
            )
            for i, slot in enumerate(slots)
        ]  # fmt: skip
        plan = StepPlan([ScheduledSequence(r, context, 1, True) for r in requests], num_tokens=self.batch)
        return build_metadata(plan, self.layout)[0]

    def program(self, with_lora: bool) -> Program:
        step = make_step(self.spec, self.layout, with_lora)
        name = f"step-{self.size.model.name}-{self.batch}{'-lora' * with_lora}"
        return Program(name, step, lambda: step_shapes(self.spec, self.layout))

    def work(self) -> Work:
        """Of a base-only step: every weight that multiplies, keys and values, once."""
        model, layers = self.size.model, self.size.model.num_layers
        rows, context = np.ones(self.batch, np.int64), np.full(self.batch, self.grid.context)
        weights = model.vocab * model.hidden + layers * sum(s.d_in * s.d_out for s in model.layout(1).stacks)
        attention = attention_work(
            rows, context, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
            itemsize=ITEMSIZE,
        )  # fmt: skip
        dense = Work(weights * ITEMSIZE, 2 * weights * self.batch)
        return dense + (attention + write_kv_work(self.batch, model.width, ITEMSIZE)) * layers

    def lora_work(self, adapters: int) -> Work:
        """What `adapters` adapters add."""
        model = self.size.model
        ranks = self.resident.ranks[:adapters]
        layout = model.layout(self.size.page_size)
        return layer_work(ranks, spread(self.batch, adapters), layout, ITEMSIZE) * model.num_layers


class Arrays:
    """A server's arrays on the device. Pool and state go from one dispatch to the next, whatever its adapters."""

    def __init__(self, server: Server) -> None:
        release()
        spec, pool = server.spec, server.spec.pool
        _, self.params = init_random(spec.model, "bfloat16", server.seed)
        shape = (pool.num_pages, 2, pool.page_size, pool.width)
        self.pool = tuple(random_array(shape, server.seed + layer, scale=0.02) for layer in range(pool.num_layers))
        self.table = server.resident.table()
        state = spec.make_state()
        table = state.page_table.at[: server.batch, : server.sequence_pages].set(server.page_table)
        self.state = replace(state, page_table=table)

    def dispatch(self, compiled: Any, metadata: np.ndarray) -> Any:
        self.pool, self.state, output = compiled(self.params, self.pool, self.table, self.state, metadata)
        return output


@lru_cache(maxsize=1)
def _arrays(server: Server) -> Arrays:
    return Arrays(server)


def section(size: Size, seed: int) -> Section:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return Section("step", list(_cases(size, grid, seed)), _arrays.cache_clear)


def _cases(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    for batch, numbers in grid.steps:
        facts = {"model": size.model.name, "batch": batch, "context": grid.context, "rank": grid.rank}
        server = Server(size, batch, max(numbers), grid, seed)
        base, lora = server.program(False), server.program(True)
        systems = [System("base", base, _start(server, 0))]
        systems += [
            System(f"{n} adapters", lora, _start(server, n), work=server.lora_work(n), over="base") for n in numbers
        ]
        yield Case("step", "decode", facts, server.work(), tuple(systems))


def _start(server: Server, adapters: int) -> Callable[[Any], Dispatch]:
    def start(compiled: Any) -> Dispatch:
        arrays, metadata = _arrays(server), server.metadata(adapters)
        return lambda: arrays.dispatch(compiled, metadata)

    return start
