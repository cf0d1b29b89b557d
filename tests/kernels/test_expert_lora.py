"""LoRA on experts in Triton against float64, with the experts' base products, in a pool whose other pages are NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experts import RAGGED, expected, layer
from test_lora_product import in_pages, weight_tiles

from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.experts import expert_outputs
from pallas_kernels.lora import AdapterTable, LoraTiles, experts, work
from pallas_kernels.lora.layout import EXPERT_PROJECTIONS
from pallas_kernels.targets import TARGETS, lower_for
from pallas_kernels.weight_format import ScaledKernels
from slora_jax.analysis import kernels_in

EXPERTS, FFN, MAX_RANK, DTYPE = 3, 24, 20, "bfloat16"
LAYOUT = replace(decoder_layout(40, 48, 16, 56, 8), experts=EXPERTS, expert_width=FFN)
RANKS = {0: [[3, 3, 9], [5, 5, 0], [0, 4, 2]], 2: [[17, 2, 1], [0, 0, 0], [1, 1, 20]]}
"""Ranks of gate, up and down of each expert, by slot. Slot 1 describes an adapter that has been evicted."""

ROW_SLOT = [2] + [0] * 10 + [1] * 3
LORA_ROWS = 11
CHOSEN = np.array([[0, 2], [0, 1], [2, 0], *[[0, 1]] * 5, *[[1, 0]] * 3, [1, 0], [2, 1], [3, 3]])
"""Slot 0 has more rows of an expert than a tile. The last token is padding."""


class Adapters:
    """The adapters of `RANKS`, which have LoRA on q too, and their dense matrices `[d_in, d_out]`."""

    def __init__(self, rng: np.random.Generator) -> None:
        layout, widths = LAYOUT.expert, {"gate": (40, FFN), "up": (40, FFN), "down": (FFN, 40)}
        ranks, pages = np.zeros((3, 10), np.int32), {}
        ranks[:, 0] = 3
        by_expert = np.full((3, EXPERTS, 3), 7, np.int32)
        self.dense: dict[int, list[dict[str, np.ndarray]]] = {-1: [{}] * EXPERTS}
        for slot, own in RANKS.items():
            by_expert[slot] = own
            tiles, self.dense[slot] = [np.full((8, 16), np.nan)] * int(LAYOUT.num_tiles(ranks[slot])), []
            for numbers in own:
                matrices = {
                    p: tuple(np.asarray(jnp.asarray(rng.normal(0, 0.3, (r, d)), DTYPE), float) for d in widths[p])
                    for p, r in zip(EXPERT_PROJECTIONS, numbers, strict=True)
                    if r
                }
                tiles += weight_tiles(layout, matrices)
                self.dense[slot].append({p: a.T @ b for p, (a, b) in matrices.items()})
            pages[slot] = in_pages(tiles)
        count = max(map(len, pages.values()))
        ids = 1 + rng.permutation(3 * count).reshape(3, count)
        pool = np.full((3 * count + 1, 2, 8, 16), np.nan)
        for slot, own in pages.items():
            pool[ids[slot, : len(own)]] = own
            ids[slot, len(own) :] = 0
        pool[0] = 1e30
        self.pool = jnp.asarray(pool, DTYPE)
        self.table = AdapterTable(*(jnp.asarray(a, jnp.int32) for a in (ids, ranks, by_expert)))


@partial(jax.jit, static_argnames="with_lora")
def run(x, chosen, weights, gate_up, down, table, pool, with_lora=True):
    none, row_slot = jnp.zeros(1, jnp.int32), jnp.asarray(ROW_SLOT, jnp.int32)
    tiles = LoraTiles(none, none, none, row_slot, *(jnp.int32(n) for n in (0, 0, 0, LORA_ROWS)))
    static = {"implementation": "triton", "interpret": True}
    prepared = experts.prepare(LAYOUT, table, tiles, dtype=x.dtype, decode=True, max_rank=MAX_RANK, **static)
    return expert_outputs(
        x, chosen, weights, gate_up, down, activation="silu", plan=RAGGED, **static,
        lora=(lambda order: experts.products(prepared, chosen, order, pool, LAYOUT)) if with_lora else None,
    )  # fmt: skip


def test_each_row_gets_the_lora_of_its_expert_of_its_adapter(rng, monkeypatch):
    monkeypatch.setattr(work, "MOST_COMPARED", 8)  # there may be twelve tiles: items are found by bisection
    adapters, tokens = Adapters(rng), len(CHOSEN)
    x, gate_up, down = layer(rng, DTYPE, tokens, EXPERTS)
    shares, chosen = rng.random(CHOSEN.shape).astype(np.float32), jnp.asarray(CHOSEN, jnp.int32)
    fixed = {"weights": shares, "gate_up": gate_up, "down": down, "table": adapters.table, "pool": adapters.pool}
    compute = partial(run, **fixed)
    found = np.asarray(compute(x, chosen))
    slots = [*ROW_SLOT[:LORA_ROWS], *[-1] * (tokens - LORA_ROWS)]
    for slot in {*slots}:
        wide = [np.asarray(a, np.float64) for a in (gate_up, down)]
        for expert, own in enumerate(adapters.dense[slot]):
            for p, columns in (("gate", np.s_[:FFN]), ("up", np.s_[FFN:])):
                wide[0][expert, :, columns] += own.get(p, 0)
            wide[1][expert] += own.get("down", 0)
        rows = np.array(slots) == slot
        reference = expected(x[rows], CHOSEN[rows], shares[rows], *wide)
        error = np.abs(found[rows].astype(np.float64) - reference).max() / np.abs(reference).max()
        assert error <= 2e-2, (slot, error)

    others = np.arange(tokens) % LORA_ROWS != 0  # all but a token of slot 2 and one without an adapter
    changed = compute(jnp.where(others[:, None], jnp.nan, x), jnp.where(others[:, None], 2 - chosen // 2, chosen))
    np.testing.assert_array_equal(np.asarray(changed)[~others], found[~others])
    plain = np.asarray(compute(x, chosen, with_lora=False))
    np.testing.assert_array_equal(plain[LORA_ROWS:], found[LORA_ROWS:])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_kernels_compile_without_spills(weights):
    """Qwen3-30B-A3B's experts and ranks up to 64, in a decode step and in a prompt's."""
    count, d, ffn, slots = 128, 2048, 768, 64
    layout = replace(decoder_layout(d, 4096, 512, ffn, 16), experts=count, expert_width=ffn)
    pages = int(layout.num_pages(np.array([64] * 7 + [0] * 3 + [64] * 3 * count)))

    def struct(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def outputs(steps, table, gate_up, down, pool):
        found = []
        for (x, chosen, shares, tiles), decode in zip(steps, (True, False), strict=True):
            own = experts.prepare(layout, table, tiles, dtype=DTYPE, decode=decode, max_rank=64)
            lora = partial(experts.products, own, chosen, pool=pool, layout=layout)
            found.append(expert_outputs(x, chosen, shares, gate_up, down, activation="silu", lora=lora))
        return found

    steps = [
        (struct(t, d, dtype=DTYPE), struct(t, 8), struct(t, 8, dtype="float32"),
         LoraTiles(*[struct(1)] * 3, struct(t), *[struct()] * 4))
        for t in (64, 8192)
    ]  # fmt: skip
    table = AdapterTable(struct(slots, pages), struct(slots, 10), struct(slots, count, 3))
    kernels = [struct(count, *dims, dtype=weights) for dims in ((d, 2 * ffn), (ffn, d))]
    if weights == "int8":
        kernels = [ScaledKernels(codes, struct(count, 1, codes.shape[2], dtype="float32")) for codes in kernels]
    pool = struct(4000, 2, 16, layout.width, dtype=DTYPE)
    target = TARGETS["h200"]
    uses = kernels_in(lower_for(target, jax.jit(outputs), steps, table, *kernels, pool), target.device)
    launched = {use.name: sum(u.count for u in uses if u.name == use.name) for use in uses}
    base = "expert_tiles_kernel", "expert_gate_up_kernel", "expert_down_kernel"
    assert launched == dict.fromkeys(base, 2) | dict.fromkeys(("lora_shrink_kernel", "lora_expand_kernel"), 4)
    for use in uses:
        assert use.spill_bytes == 0 and use.shared_bytes <= target.device.shared_bytes, use
