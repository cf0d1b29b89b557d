"""Cases of whole steps: the engine's program, base only and with adapters on all linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pallas_kernels.bench.adapters import Adapters, max_pages, resident, spread
from pallas_kernels.bench.case import Case, Dispatch, Program, System
from pallas_kernels.bench.pools import random_array, random_pages
from pallas_kernels.bench.size import Size
from pallas_kernels.lora.layout import LoraLayout, ceil_div
from pallas_kernels.lora.roofline import layer_work
from pallas_kernels.paged_attention.roofline import attention_work
from pallas_kernels.pool_write.roofline import write_kv_work
from pallas_kernels.roofline import Work
from slora_jax.engine.batch import BatchLayout, Bucket, build_metadata
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.engine.step_spec import StepSpec
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, abstract_decoder, init_random
from slora_jax.scheduling import AdapterUse, Request, RequestMetrics, SamplingParams, StepPlan
from slora_jax.scheduling.plan import ScheduledSequence

ITEMSIZE = 2
"""bfloat16."""


@dataclass(frozen=True)
class Grid:
    """Shapes of the steps.

    Attributes:
      steps: decoding sequences of a step, and the numbers of distinct adapters it is measured with.
      prefill: prompts, tokens of each, decoding sequences beside them, and numbers of adapters.
      context: tokens before the token of a decoding sequence.
      rank: of every projection.
      max_rank: of the compiled programs.
    """

    steps: tuple[tuple[int, tuple[int, ...]], ...]
    prefill: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    context: int
    rank: int
    max_rank: int


FULL = Grid(
    steps=((64, (1, 16, 64)), (256, (1, 16, 64, 256))),
    prefill=((8, 505, 56, (1, 64)),),
    context=512, rank=16, max_rank=64,
)  # fmt: skip
MINIATURE = Grid(steps=((4, (1, 2)),), prefill=(), context=12, rank=8, max_rank=8)


@dataclass(frozen=True, eq=False)
class Server:
    """The state shared by the steps of one batch: the engine's program, and a pool with every sequence and adapter.

    Attributes:
      rows, context: int `[batch]`, each sequence's rows in a step, and its tokens before them.
      adapters: number of resident adapters.
    """

    size: Size
    rows: np.ndarray
    context: np.ndarray
    adapters: int
    grid: Grid
    seed: int

    @property
    def batch(self) -> int:
        return self.rows.size

    @property
    def decode(self) -> bool:
        return bool((self.rows == 1).all())

    @property
    def lora_layout(self) -> LoraLayout:
        return self.size.model.layout(self.size.page_size)

    @property
    def pages_per_adapter(self) -> int:
        return int(self.lora_layout.num_pages(np.full(7, self.grid.rank)))

    @property
    def pages_per_sequence(self) -> int:
        return ceil_div(int((self.context + self.rows).max()), self.size.page_size)

    @cached_property
    def resident(self) -> Adapters:
        """All adapters, in random order on the pool's first pages; the sequences have the pages after them."""
        pages, rng = 1 + self.adapters * self.pages_per_adapter, np.random.default_rng(self.seed)
        facts = {"slots": self.adapters, "max_rank": self.grid.max_rank, "pool_pages": pages}
        return resident(self.lora_layout, self.grid.rank, **facts, rng=rng)

    @cached_property
    def page_table(self) -> np.ndarray:
        """int32 `[batch, pages_per_sequence]`."""
        count, first = self.batch * self.pages_per_sequence, self.adapters * self.pages_per_adapter
        ids = first + random_pages(count, count + 1, np.random.default_rng(self.seed))
        return ids.reshape(self.batch, self.pages_per_sequence)

    @cached_property
    def spec(self) -> StepSpec:
        model, page_size = self.size.model, self.size.page_size
        config = ModelConfig.from_dict(model.config())
        graphdef, params = abstract_decoder(config, "bfloat16")
        num_pages = 1 + self.adapters * self.pages_per_adapter + self.batch * self.pages_per_sequence
        largest = max_pages(self.lora_layout, self.grid.max_rank)
        pool = PoolShape(model.num_layers, num_pages, page_size, model.width, "bfloat16", self.adapters, largest)
        sequence_pages = ceil_div(model.max_tokens, page_size)
        return StepSpec(config, graphdef, params, pool, self.batch, sequence_pages, self.grid.max_rank)

    @cached_property
    def layout(self) -> BatchLayout:
        return self.spec.layout(Bucket(tokens=int(self.rows.sum()), seqs=self.batch, decode=self.decode))

    def metadata(self, adapters: int) -> np.ndarray:
        """A step with the sequences spread over `adapters` adapters (0: the base model)."""
        slots = self.slots(adapters) if adapters else np.full(self.batch, -1)
        uses = [AdapterUse(str(slot), str(slot), ranks, 0) for slot, ranks in enumerate(self.resident.ranks)]
        shapes = list(zip(self.rows.tolist(), self.context.tolist(), strict=True))
        requests = [
            Request(
                id=str(i), number=i, prompt=[0] * (context or rows), params=SamplingParams(), seed=0, max_new=1,
                num_sampled=1, adapter=None if slot < 0 else uses[slot], metrics=RequestMetrics(0.0), slot=i,
                adapter_slot=slot, pages=self.page_table[i].tolist(),
            )
            for i, (slot, (rows, context)) in enumerate(zip(slots.tolist(), shapes, strict=True))
        ]  # fmt: skip
        sequences = [
            ScheduledSequence(r, context, rows, True) for r, (rows, context) in zip(requests, shapes, strict=True)
        ]
        plan = StepPlan(sequences, num_tokens=int(self.rows.sum()))
        return build_metadata(plan, self.layout)[0]

    def program(self, with_lora: bool) -> Program:
        step = make_step(self.spec, self.layout, with_lora)
        kind = "" if self.decode else f"{self.rows.sum()}-"
        name = f"step-{self.size.model.name}-{kind}{self.batch}{'-lora' * with_lora}"
        return Program(name, step, lambda: step_shapes(self.spec, self.layout))

    def work(self) -> Work:
        """A base-only step: every weight of a product, keys and values, once."""
        model, layers = self.size.model, self.size.model.num_layers
        head, rows = model.vocab * model.hidden, int(self.rows.sum())
        weights = layers * sum(s.d_in * s.d_out for s in model.layout(1).stacks)
        heads = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
        attention = attention_work(self.rows, self.context, **heads, itemsize=ITEMSIZE)
        dense = Work((weights + head) * ITEMSIZE, 2 * (weights * rows + head * self.batch))
        return dense + (attention + write_kv_work(rows, model.width, ITEMSIZE)) * layers

    def slots(self, adapters: int) -> np.ndarray:
        """Each sequence's adapter: int `[batch]`."""
        return np.repeat(np.arange(adapters), spread(self.batch, adapters))

    def lora_work(self, adapters: int) -> Work:
        """The additional work of `adapters` adapters."""
        ranks, rows = self.resident.ranks[:adapters], np.bincount(self.slots(adapters), self.rows).astype(int)
        return layer_work(ranks, rows, self.lora_layout, ITEMSIZE) * self.size.model.num_layers


class Arrays:
    """A server's arrays on the device. Each dispatch takes pool and state from the one before."""

    def __init__(self, server: Server) -> None:
        spec, pool = server.spec, server.spec.pool
        _, self.params = init_random(spec.model, "bfloat16", server.seed)
        shape = (pool.num_pages, 2, pool.page_size, pool.width)
        self.pool = tuple(random_array(shape, server.seed + layer, scale=0.02) for layer in range(pool.num_layers))
        resident, ranks = server.resident.table(), pool.make_table().ranks
        self.table = replace(resident, ranks=ranks.at[:, : resident.ranks.shape[1]].set(resident.ranks))
        state = spec.make_state()
        table = state.page_table.at[: server.batch, : server.pages_per_sequence].set(server.page_table)
        self.state = replace(state, page_table=table)

    def dispatch(self, compiled: Any, metadata: np.ndarray) -> Any:
        self.pool, self.state, output = compiled(self.params, self.pool, self.table, self.state, metadata)
        return output


@lru_cache(maxsize=1)
def _arrays(server: Server) -> Arrays:
    return Arrays(server)


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return list(_cases(size, grid, seed))


def _cases(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    model, rest = {"model": size.model.name}, {"context": grid.context, "rank": grid.rank}
    for batch, numbers in grid.steps:
        server = Server(size, np.ones(batch, int), np.full(batch, grid.context), max(numbers), grid, seed)
        yield Case("step", "decode", model | {"batch": batch} | rest, server.work(), tuple(_systems(server, numbers)))
    for prompts, length, decoding, numbers in grid.prefill:
        shapes = (length, 1), (0, grid.context)
        server = Server(size, *(np.repeat(shape, (prompts, decoding)) for shape in shapes), max(numbers), grid, seed)
        facts = model | {"prompts": prompts, "length": length, "decoding": decoding} | rest
        yield Case("step", "prefill", facts, server.work(), tuple(_systems(server, numbers)), importance=2)


def _systems(server: Server, numbers: tuple[int, ...]) -> Iterator[System]:
    base, lora = server.program(False), server.program(True)
    yield System("base", base, _start(server, 0))
    for n in numbers:
        yield System(f"{n} adapters", lora, _start(server, n), work=server.lora_work(n), over="base")


def _start(server: Server, adapters: int) -> Callable[[Any], Dispatch]:
    def start(compiled: Any) -> Dispatch:
        arrays, metadata = _arrays(server), server.metadata(adapters)
        return lambda: arrays.dispatch(compiled, metadata)

    return start
