"""The Mosaic GPU attention under Pallas' interpreter, against float64 NumPy; and compiled for an absent H200.

Free pages, rows after a sequence's last, unwritten outputs and shared memory are NaN. The interpreter checks every
access for races. It refuses `wgmma` with an operand in registers, and its source marks
`run_state` of an accumulator as not handled. The kernel's second product uses both; interpreted, it takes its
operand from shared memory and adds to the sums afterwards, so that product is compiled here but not run.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import devices
from pallas_kernels.paged_attention import AttentionTiles, mosaic_gpu, xla
from pallas_kernels.paged_attention.mosaic_gpu.work import block_rows, mixed_work
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from slora_jax.analysis import kernels_in

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
PLAN = MosaicGpuPlan(block_n=64, stages=2)
MAX_TOKENS = 290
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Case:
    """Heads, page size, rows and sequences of the step, and each real sequence's `(context, length)`."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    sequences: tuple[tuple[int, int], ...]
    rows: int
    seqs: int
    window: int | None = None
    dtype: str = "bfloat16"
    plan: MosaicGpuPlan = PLAN

    @property
    def shape(self) -> AttentionShape:
        max_pages = -(-MAX_TOKENS // self.page_size)
        return AttentionShape(
            self.heads, self.kv_heads, self.head_dim, self.page_size, jnp.dtype(self.dtype), self.seqs, max_pages,
            self.rows, False, self.window,
        )  # fmt: skip


# Group sizes, page sizes, head sizes and dtypes are spread over the cases, which together take every branch.
CASES = {
    "group_1_small_pages": Case(1, 1, 64, 8, ((0, 131), (120, 9)), 144, 2),
    "group_3_large_pages_window": Case(6, 2, 128, 32, ((130, 9), (0, 1), (0, 20)), 40, 4, window=50, dtype="float16"),
}
# Earlier context; one-row sequences between prompts; ragged tails followed by another sequence's rows.
MIXED = Case(8, 1, 64, 16, ((100, 21), (33, 1), (0, 17), (64, 1)), 48, 6)


class Step:
    """Queries, and keys and values in pages in random order, in a pool where all else is NaN."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        shape, dtype = case.shape, DTYPES[case.dtype]
        self.q = (2 * rng.standard_normal((case.rows, case.heads, case.head_dim))).astype(dtype)
        self.kv = [rng.standard_normal((c + n, 2, shape.width)).astype(dtype) for c, n in case.sequences]
        num_pages = 1 + case.seqs * shape.max_pages
        self.pool = np.full((num_pages, 2, case.page_size, shape.width), np.nan, dtype)
        free = rng.permutation(num_pages).tolist()
        self.table = rng.integers(0, num_pages, (case.seqs, shape.max_pages))  # stale behind a sequence's end
        for seq, kv in enumerate(self.kv):
            for position in range(len(kv)):
                page, offset = divmod(position, case.page_size)
                if offset == 0:
                    self.table[seq, page] = free.pop()
                self.pool[self.table[seq, page], :, offset] = kv[position]
        self.tiles = self._tiles(rng)

    def _tiles(self, rng: np.random.Generator) -> AttentionTiles:
        case, tile = self.case, 16
        context, length = np.zeros((2, case.seqs), int)
        context[: len(case.sequences)], length[: len(case.sequences)] = np.transpose(case.sequences)
        first_row = np.where(length > 0, np.cumsum(length) - length, 0)
        one = sorted(np.flatnonzero(length == 1).tolist(), key=lambda s: -context[s])
        decode_seq = rng.integers(0, case.seqs, case.seqs)
        decode_seq[: len(one)] = one
        cut = [(s, row) for s in np.flatnonzero(length > 1) for row in range(0, length[s], tile)]
        prefill = rng.integers(0, case.seqs, (-(-case.rows // tile) + case.seqs, 2))
        prefill[: len(cut)] = np.reshape(cut, (-1, 2))
        arrays = (self.table, first_row, length, context, *prefill.T, len(cut), decode_seq, len(one))
        return AttentionTiles(*(jnp.asarray(a, jnp.int32) for a in arrays))

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, and the error that the dtype allows: roundings of probabilities and of the result."""
        case, group = self.case, self.case.shape.group
        out, bound = np.zeros((2, *self.q.shape))
        row = 0
        for (context, length), kv in zip(case.sequences, self.kv, strict=True):
            k, v = kv.astype(float).reshape(len(kv), 2, case.kv_heads, -1).repeat(group, 2).swapaxes(0, 1)
            for position in range(context, context + length):
                seen = slice(max(position + 1 - (case.window or MAX_TOKENS), 0), position + 1)
                scores = np.einsum("hd,thd->th", self.q[row].astype(float), k[seen]) * case.head_dim**-0.5
                p = np.exp(scores - scores.max(0))
                p /= p.sum(0)
                out[row] = np.einsum("th,thd->hd", p, v[seen])
                bound[row] = UNIT[case.dtype] * (abs(out[row]) + np.einsum("th,thd->hd", p, abs(v[seen]))) + 1e-5
                row += 1
        return out, bound


def interpreted(step: Step) -> np.ndarray:
    """Not under `jax.jit`, where more of XLA's threads wait for one another: see `Attention`."""
    attend = mosaic_gpu.Attention(step.tiles, step.case.shape, plan=step.case.plan, interpret=True)
    out = np.asarray(attend(jnp.asarray(step.q), jnp.asarray(step.pool)))
    assert not gpu_callbacks.get_races().races_found
    assert out.dtype == step.q.dtype
    return out


def check(step: Step) -> np.ndarray:
    out = interpreted(step)
    expected, bound = step.expected()
    error = abs(out.astype(float) - expected)
    assert (error <= bound).all(), (np.nanmax(error / np.maximum(bound, 1e-9)), np.isnan(error).sum())
    used = sum(length for _, length in step.case.sequences)
    np.testing.assert_array_equal(out[used:], np.zeros_like(out[used:]))
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_row_attends_to_its_own_sequence_up_to_itself(case):
    check(Step(case, np.random.default_rng(0)))


def test_a_step_with_one_random_sequence_equals_the_reference(rng):
    context, length = int(rng.integers(0, 250)), int(rng.choice([2, 7]))
    print("(context, length) of the random sequence:", context, length)
    step = Step(replace(MIXED, sequences=(*MIXED.sequences, (context, length))), rng)
    reference = xla.Attention(step.tiles, MIXED.shape, 16)(jnp.asarray(step.q), jnp.asarray(step.pool))
    np.testing.assert_allclose(check(step).astype(float), np.asarray(reference, float), atol=0.03)


def test_the_work_list_has_every_row_once():
    rng = np.random.default_rng(5)
    seqs, rows = 12, 512
    shape = AttentionShape(8, 2, 64, 16, jnp.dtype("bfloat16"), seqs, 188, rows, False)
    for _ in range(12):
        length, context = rng.choice([0, 1, 2, 16, 17, 40], seqs), rng.integers(0, 3000, seqs)
        first_row = np.where(length > 0, np.cumsum(length) - length, 0)
        none = np.zeros(0)
        tiles = (np.zeros((seqs, 188)), first_row, length, context * (length > 0), none, none, 0, none, 0)
        tiles = AttentionTiles(*(jnp.asarray(a, jnp.int32) for a in tiles))
        seen = np.zeros(rows, int)
        for seq, block, own_first, own_last, shift, keys in np.asarray(mixed_work(tiles, shape)):
            seen[own_first:own_last] += 1
            assert block % block_rows(4) == 0 and block <= own_first and own_last <= block + 32
            if own_last > own_first and keys:
                assert shift == context[seq] - first_row[seq] and keys == context[seq] + length[seq]
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"head_dim": 256}, "head_dim 256.*would spill registers"),
        ({"page_size": 4}, "page_size 4"),
        ({"page_size": 128}, "page_size 128"),
        ({"heads": 32}, "32 query heads"),
    ],
)
def test_unsupported_shapes_are_declined_with_the_reason(change, reason):
    case = replace(MIXED, **change)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.Attention(None, case.shape, plan=PLAN)


def test_limited_scores_are_declined():
    with pytest.raises(NotImplementedError, match="score_cap 50.0; 'triton' and 'xla' limit scores"):
        mosaic_gpu.Attention(None, replace(MIXED.shape, score_cap=50.0), plan=PLAN)


def test_decode_steps_are_declined():
    with pytest.raises(NotImplementedError, match="decode steps; 'triton' and 'xla' serve them"):
        mosaic_gpu.Attention(None, replace(MIXED.shape, decode=True))


def test_other_gpu_generations_are_declined():
    with devices.compiling_for(devices.DEVICES["a100"]), pytest.raises(NotImplementedError, match="a100; Hopper"):
        mosaic_gpu.Attention(None, MIXED.shape)


@pytest.mark.parametrize("change", [{"block_n": 192}, {"stages": 0}])
def test_invalid_plans_are_refused(change):
    with pytest.raises(ValueError, match="block_n must be 64, 128 or 256, and stages positive"):
        replace(PLAN, **change)


def program(shape: AttentionShape, num_pages: int, layers: int = 1, make=lower_for):
    """Attention of some layers with the plan table's block shapes, lowered or compiled for an H200."""

    def struct(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def attend(q, pools, tiles):
        attention = mosaic_gpu.Attention(tiles, shape)
        for pool in pools:
            q = attention(q, pool)
        return q

    seqs = shape.num_seqs
    tiles = AttentionTiles(
        struct(seqs, shape.max_pages), *[struct(seqs)] * 3, *[struct(seqs)] * 2, struct(), struct(seqs), struct()
    )
    q = struct(shape.max_rows, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    pools = [struct(num_pages, 2, shape.page_size, shape.width, dtype=shape.dtype)] * layers
    return make(TARGETS["h200"], jax.jit(attend), q, pools, tiles)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "window"),
    [
        # One of each entry of the plan table, and another page size, dtype, window and group.
        (32, 8, 64, 8, "bfloat16", None),
        (40, 40, 128, 16, "bfloat16", None),
        (28, 4, 128, 8, "float16", 4096),
    ],
)
def test_every_plan_compiles_without_spills(heads, kv_heads, head_dim, page_size, dtype, window):
    shape = AttentionShape(heads, kv_heads, head_dim, page_size, jnp.dtype(dtype), 64, 512, 8192, False, window)
    layers = 2 if window else 1
    made = program(shape, num_pages=40_000, layers=layers, make=compile_for if window else lower_for)
    (use,) = kernels_in(made, devices.DEVICES["h200"])  # all layers share it
    print(use.name, use.registers, "registers", use.shared_bytes, "bytes shared")
    assert (use.name, use.backend, use.count) == ("paged_attention_mixed", "mosaic_gpu", layers)
    assert use.spill_bytes == 0 and use.shared_bytes <= devices.DEVICES["h200"].shared_bytes
    assert "wgmma.mma_async" in use.ptx and "cp.async.bulk.tensor" in use.ptx
    if window:
        assert made.memory_analysis().temp_size_in_bytes < 64e6  # never the pool, or keys gathered
