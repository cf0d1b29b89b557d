"""Predicted times of the benchmark's cases: `python -m experiments.kernel_bench --predict DEVICE`.

Predictions are of this project's kernels (Triton, and XLA's writes), in one layer, and of whole steps. They are
computed from a case's facts; nothing is compiled or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from pallas_kernels.bench.adapters import resident, spread
from pallas_kernels.bench.case import Case
from pallas_kernels.bench.size import Size
from pallas_kernels.devices import compiling_for
from pallas_kernels.lora import lora_tile_rows
from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import ExpandPlan, ShrinkPlan, block_ranks, expand_plan, gradient_plan, shrink_plan
from pallas_kernels.lora.roofline import INTERMEDIATE_BYTES, backward_work, expand_work, shrink_work
from pallas_kernels.paged_attention import bench as attention_bench
from pallas_kernels.paged_attention.plan import AttentionShape
from pallas_kernels.paged_attention.roofline import attention_call
from pallas_kernels.pool_write.roofline import write_kv_work
from pallas_kernels.prediction import (
    MATMUL_SHARE,
    Call,
    KernelCost,
    Prediction,
    copy_bandwidth,
    floor_seconds,
    kernel_cost,
    predict,
)
from pallas_kernels.roofline import Work
from pallas_kernels.targets import Target

ITEMSIZE = 2
"""bfloat16."""
BASE_SHARE = 0.85
"""Bandwidth of the products with base weights in a decode step, as a share of a copy's."""
BASE_LAUNCHES = 10
"""XLA's own launches in a decode layer, counted in the compiled step without attention and the write of keys."""
BASE_LAUNCH_SECONDS = 2e-6
PROGRAM_COLUMNS = 1024

WORKS = {"lora_shrink": shrink_work, "lora_expand": expand_work}


@dataclass(frozen=True)
class Predictor:
    """Predicts cases of one size on one device."""

    size: Size
    target: Target

    def rows(self, cases: list[Case]) -> Iterator[dict[str, Any]]:
        """Yields a row for every case that is not a check: label, system, floor, prediction."""
        for case in cases:
            if not case.is_check and case.op in self._ops:
                yield from self._ops[case.op](case)

    @property
    def _ops(self) -> dict[str, Callable[[Case], Iterator[dict[str, Any]]]]:
        return {
            "lora": self._lora,
            "lora_shrink": self._lora,
            "lora_expand": self._lora,
            "attention": self._attention,
            "experts": self._experts,
            "write_kv": self._write,
            "write_pages": self._write,
            "sampler": self._sampler,
            "step": self._step,
        }

    def _row(self, label: str, system: str, work: Work, prediction: Prediction) -> dict[str, Any]:
        return {
            "label": label,
            "system": system,
            "bytes": work.bytes,
            "flops": work.flops,
            "floor_seconds": floor_seconds(work, self.target.device),
            "predicted_seconds": prediction.seconds,
            "bound": prediction.bound,
            "parts": dict(prediction.parts),
        }

    def _predict(self, call: Call) -> Prediction:
        return predict(call, self.target.device, self.target.clock_ghz * 1e9)

    def _layout(self, model: str) -> LoraLayout:
        models = self.size.model, self.size.second_model
        return next(m.layout(self.size.page_size) for m in models if m.name == model)

    def _lora(self, case: Case) -> Iterator[dict[str, Any]]:
        facts = case.facts
        if "alone" in facts:  # the loop over adapters
            return
        ops = tuple(WORKS) if case.op == "lora" else (case.op,)
        counts, layout = spread(facts["rows"], facts["adapters"]), self._layout(facts["model"])
        ranks = self._ranks(layout, facts["rank"], facts["adapters"])
        yield self._row(case.label, "triton", case.work, self._lora_calls(ops, layout, ranks, counts, case.regime))

    def _ranks(self, layout: LoraLayout, rank: int | str, adapters: int) -> np.ndarray:
        size, rng = self.size, np.random.default_rng(0)
        facts = {"slots": adapters, "max_rank": size.max_rank, "pool_pages": size.pool_pages}
        return resident(layout, rank, **facts, rng=rng).ranks

    def _lora_calls(
        self, ops: tuple[str, ...], layout: LoraLayout, ranks: np.ndarray, counts: np.ndarray, regime: str
    ) -> Prediction:
        call = lora_call if regime == "decode" else prefill_call
        with compiling_for(self.target.device):
            rows = lora_tile_rows(layout, "bfloat16", decode=regime == "decode", implementation="triton")
            calls = [
                call(op, layout, stack, ranks, counts, rows, kernel_cost(op, regime))
                for op in ops
                for stack in layout.stacks
            ]
        return reduce(add, map(self._predict, calls), Prediction())

    def _attention(self, case: Case) -> Iterator[dict[str, Any]]:
        facts, decode = case.facts, case.regime == "decode"
        if decode:
            batch = facts["batch"]
            step = attention_bench.Shape(self.size, batch, batch, True)
            sequences: attention_bench.Sequences = ((batch, 1, facts["context"] - 1),)
        else:
            grid = attention_bench.MINIATURE if self.size.miniature else attention_bench.FULL
            step = attention_bench.Shape(self.size, grid.prefill_rows, grid.prefill_seqs, False)
            sequences = grid.prefill[facts["sequences"]]
        rows, context = (np.concatenate([np.full(s[0], s[i]) for s in sequences]) for i in (1, 2))
        call = self._attention_call(rows, context, step.rows, step.seqs)
        yield self._row(case.label, "triton", case.work, self._predict(call))

    def _attention_call(self, rows: np.ndarray, context: np.ndarray, max_rows: int, seqs: int) -> Call:
        """A decode step if every sequence has one row."""
        model, size = self.size.model, self.size
        shape = AttentionShape(
            model.num_heads, model.num_kv_heads, model.head_dim, size.page_size, np.dtype("bfloat16"), seqs,
            ceil_div(size.max_context, size.page_size), max_rows, bool((rows == 1).all()),
        )  # fmt: skip
        with compiling_for(self.target.device):
            return attention_call(rows, context, shape)

    def _experts(self, case: Case) -> Iterator[dict[str, Any]]:
        call = Call((case.work,), kernel_cost("experts", case.regime))
        yield self._row(case.label, "triton", case.work, self._predict(call))

    def _write(self, case: Case) -> Iterator[dict[str, Any]]:
        yield self._row(case.label, "xla", case.work, self._predict(Call((case.work,), kernel_cost(case.op, "write"))))

    def _sampler(self, case: Case) -> Iterator[dict[str, Any]]:
        for system in case.systems:
            cost = kernel_cost("sampler", system.name)
            programs = case.facts["batch"] if cost.instructions_per_kb else 0  # of the search
            call = Call((case.work,), cost, programs, case.work.bytes / 1024)
            yield self._row(case.label, system.name, case.work, self._predict(call))

    def _step(self, case: Case) -> Iterator[dict[str, Any]]:
        """The base step, and with adapters' launches after one another in between."""
        model, facts, device, layers = self.size.model, case.facts, self.target.device, self.size.model.num_layers
        if case.regime == "decode":
            kinds = [(facts["batch"], 1, facts["context"])]
        else:
            kinds = [(facts["prompts"], facts["length"], 0), (facts["decoding"], 1, facts["context"])]
        rows, context = (np.concatenate([np.full(kind[0], kind[of]) for kind in kinds]) for of in (1, 2))
        attention = self._attention_call(rows, context, int(rows.sum()), rows.size)
        write = Call((write_kv_work(int(rows.sum()), model.width, ITEMSIZE),), kernel_cost("write_kv", "write"))
        own = sum((*attention.works, *write.works), Work()) * layers
        products = Work(case.work.bytes - own.bytes, case.work.flops - own.flops)
        seconds = products.seconds(BASE_SHARE * copy_bandwidth(device), MATMUL_SHARE * device.matmul_flops)
        bound = "bandwidth" if case.regime == "decode" else "matmul"
        base = Prediction({"launch": BASE_LAUNCHES * layers * BASE_LAUNCH_SECONDS, bound: seconds})
        base += (self._predict(attention) + self._predict(write)) * layers
        layout = model.layout(self.size.page_size)
        for system in case.systems:
            work, prediction = case.work, base
            if system.work is not None:
                adapters = int(system.name.split()[0])
                of_adapter = np.repeat(np.arange(adapters), spread(rows.size, adapters))
                ranks = self._ranks(layout, facts["rank"], adapters)
                counts = np.bincount(of_adapter, rows).astype(int)
                work += system.work
                prediction += self._lora_calls(tuple(WORKS), layout, ranks, counts, case.regime) * layers
            yield self._row(case.label, system.name, work, prediction)


def lora_call(
    op: str, layout: LoraLayout, stack: Stack, ranks: np.ndarray, counts: np.ndarray, tile_rows: int, cost: KernelCost
) -> Call:
    """Returns one stack's call of shrink or expand, whose programs compute one tile of weights (of a wide pool, at most
    `PROGRAM_COLUMNS` of its columns) for one tile of rows.

    Args:
      ranks, counts: int `[n, 7]` and `[n]`, the adapters' ranks and rows.
      tile_rows: most rows of a tile.
    """
    tiles = layout.stack_tiles(ranks)[0][layout.stacks.index(stack)]
    wide, narrow = layout.b_chunks(stack)
    blocks = ceil_div(tiles.rows, layout.page_size)
    of_a, of_b = blocks * layout.a_chunks(stack), tiles.wide_blocks * (wide - narrow) + blocks * narrow
    programs = int(((of_a if op == "lora_shrink" else of_b) * ceil_div(counts, tile_rows)).sum())
    kilobytes = programs * layout.page_size * layout.width * ITEMSIZE / 1024
    programs *= ceil_div(layout.width, PROGRAM_COLUMNS)
    return Call((WORKS[op](ranks, counts, stack, ITEMSIZE),), cost, programs, kilobytes)


def prefill_call(
    op: str, layout: LoraLayout, stack: Stack, ranks: np.ndarray, counts: np.ndarray, tile_rows: int, cost: KernelCost
) -> Call:
    """Returns one stack's call in a step with prefill, planned for the current trace's device. Arguments as in
    `lora_call`. An item of shrink multiplies a whole block of ranks, whatever part of it is in use."""
    rank, page = np.asarray(ranks)[:, list(stack.rank_index)], layout.page_size
    facts = {"decode": False, "rows": int(counts.sum()), "width": layout.width, "page_size": page}
    shrink, expand = shrink_plan(d_in=stack.d_in, **facts), expand_plan(d_out=stack.d_out, **facts)
    plan: ShrinkPlan | ExpandPlan = shrink if op == "lora_shrink" else expand
    if op == "lora_shrink":
        block = block_ranks(page, backend="triton", decode=False)
        items = ceil_div(rank.sum(1), block) * shrink.splits(stack.d_in)
        weights = items * block * min(shrink.slice_k, stack.d_in)
    else:
        blocks = ceil_div(np.array(stack.d_outs), expand.block_n)
        items = ((rank > 0) * blocks).sum(1)
        weights = (ceil_div(rank, page) * page * blocks * expand.block_n).sum(1)
    tiles, cost = ceil_div(counts, tile_rows), replace(cost, warps=plan.warps, per_sm=plan.programs)
    work, kilobytes = WORKS[op](ranks, counts, stack, ITEMSIZE), int((tiles * weights).sum()) * ITEMSIZE / 1024
    return Call((work,), cost, int((tiles * items).sum()), kilobytes)


def backward_calls(
    layout: LoraLayout, stack: Stack, ranks: np.ndarray, counts: np.ndarray, max_rank: int
) -> dict[str, Call]:
    """Returns the calls of the backward pass of one stack by kernel; "sums" adds up the planes of `x A` and of g.

    Args:
      ranks, counts: as in `lora_call`.
      max_rank: bound of any projection's rank, which sizes the planes.
    """
    works, cost = backward_work(ranks, counts, stack, ITEMSIZE), kernel_cost("lora_gradient", "training")
    facts = {"width": layout.width, "page_size": layout.page_size}
    b = gradient_plan(rank=max_rank, **facts)
    a = gradient_plan(rank=len(stack.projections) * max_rank, **facts)
    rows, adapters = int(counts.sum()), int((counts > 0).sum())
    shrink = shrink_plan(decode=False, rows=rows, d_in=stack.d_in, width=layout.width)
    planes = ceil_div(stack.d_outs[0], b.block_n) + shrink.splits(stack.d_in) + 2
    sums = Work(planes * rows * len(stack.projections) * ceil_div(max_rank, 32) * 32 * INTERMEDIATE_BYTES)
    of_b, of_a = (replace(cost, warps=plan.warps, per_sm=plan.programs) for plan in (b, a))
    return {
        "gradient_b": Call((works["gradient_b"],), of_b, adapters * sum(ceil_div(d, b.block_n) for d in stack.d_outs)),
        "gradient_a": Call((works["gradient_a"],), of_a, adapters * ceil_div(stack.d_in, a.block_n)),
        "dx": Call((works["dx"],), kernel_cost("lora_expand", "prefill")),
        "sums": Call((sums,), KernelCost(launches=2, launch_seconds=BASE_LAUNCH_SECONDS)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows: microseconds, and the floor's share of the prediction."""
    lines = [f"{'floor µs':>10} {'predicted':>10} {'share':>6}  {'bound':<10} case: system"]
    for row in rows:
        floor, seconds = row["floor_seconds"], row["predicted_seconds"]
        lines.append(
            f"{1e6 * floor:10.1f} {1e6 * seconds:10.1f} {floor / seconds:6.0%}  {row['bound']:<10} "
            f"{row['label']}: {row['system']}"
        )
    return "\n".join(lines)
