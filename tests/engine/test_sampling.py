"""Sampling on the device compared with float64 references; random streams do not depend on the rest of the batch."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels.cutoff import cutoff
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax import EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.analysis import launches
from slora_jax.engine import sampling
from slora_jax.engine.after_step import AFTER_STEP
from slora_jax.engine.sampling import Sampled, SamplingInputs
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.models.config import read_json

VOCAB = 97
LLAMA_3_8B = Path(__file__).parents[2] / "experiments" / "models" / "llama-3-8b.json"
draw = jax.jit(lambda logits, best, inputs: sampling.score(logits, sampling.sample(logits, best, inputs)))
greedy = jax.jit(sampling.greedy)


@jax.jit
def searched(logits: jax.Array, inputs: SamplingInputs) -> SamplingInputs:
    """Returns the inputs with the cutoff of top-k and top-p."""
    found = cutoff(logits, greedy(logits), inputs.temperature, inputs.top_k, inputs.top_p)
    return replace(inputs, cutoff=found)


def sample(logits: np.ndarray, inputs: SamplingInputs) -> Sampled:
    """Draws after the search, as a step with top-k or top-p does."""
    return draw(logits, greedy(logits), searched(logits, inputs))


def inputs(rows: int, **fields: object) -> SamplingInputs:
    """fields: one value for all rows, or one per row."""
    types = {
        "temperature": (np.float32, 1.0),
        "top_k": (np.int32, 0),
        "top_p": (np.float32, 1.0),
        "min_p": (np.float32, 0.0),
        "seed": (np.uint32, 0),
        "output_index": (np.int32, 1),
        "cutoff": (np.float32, np.inf),
    }
    return SamplingInputs(
        **{
            name: np.broadcast_to(np.asarray(fields.get(name, default), dtype), (rows,)).copy()
            for name, (dtype, default) in types.items()
        }
    )


def kept_tokens(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Returns bool `[V]`, computed in float64: top-k, then top-p of the rest, then min-p. Equal logits are kept
    together."""
    logits = logits.astype(np.float64)
    keep = np.ones(logits.size, bool)
    if 0 < top_k < logits.size:
        keep &= logits >= np.sort(logits)[-top_k]
    p = np.where(keep, np.exp(logits - logits.max()), 0)
    p /= p.sum()
    if top_p < 1:
        thresholds = np.unique(logits)[::-1]
        keep &= logits >= next(t for t in thresholds if p[logits >= t].sum() >= min(np.float32(top_p), p.sum()))
    return keep & (np.exp(logits - logits.max()) >= min_p)


def device_mask(logits: np.ndarray, **fields: object) -> np.ndarray:
    found = searched(logits, inputs(len(logits), **fields))
    distance = logits.max(-1, keepdims=True) - logits
    return (distance <= np.asarray(found.cutoff)[:, None]) & (np.exp(-distance) >= np.asarray(found.min_p)[:, None])


CASES = [
    *({"top_k": k} for k in (1, 2, 50, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1)),
    *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)),
    *({"min_p": p} for p in (1e-6, 0.05, 0.5, 1.0)),
    {"top_k": 20, "top_p": 0.7, "min_p": 0.02},
    {"top_k": 3, "top_p": 0.99},
    {"top_p": 0.5, "min_p": 0.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_agree_with_a_float64_reference(case: dict, rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((16, VOCAB)) * rng.choice([0.1, 1, 5], (16, 1))).astype(np.float32)
    expected = np.stack([kept_tokens(row, **case) for row in logits])
    np.testing.assert_array_equal(device_mask(logits, **case), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_agree_with_transformers(case: dict, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = (3 * rng.standard_normal((16, VOCAB))).astype(np.float32)
    scores = torch.from_numpy(logits).double()
    if case.get("top_k"):
        scores = TopKLogitsWarper(min(case["top_k"], VOCAB))(None, scores)
    if "top_p" in case:
        scores = TopPLogitsWarper(case["top_p"])(None, scores)
    if "min_p" in case:
        scores = MinPLogitsWarper(case["min_p"])(None, scores)
    np.testing.assert_array_equal(device_mask(logits, **case), torch.isfinite(scores).numpy())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tied_tokens_are_kept_or_masked_together(case: dict, rng: np.random.Generator) -> None:
    logits = rng.integers(-4, 5, (16, VOCAB)).astype(np.float32)
    expected = np.stack([kept_tokens(row, **case) for row in logits])
    np.testing.assert_array_equal(device_mask(logits, **case), expected)


def test_rows_have_their_own_parameters(rng: np.random.Generator) -> None:
    logits = np.repeat(rng.standard_normal((1, VOCAB)).astype(np.float32), 3, 0)
    found = device_mask(logits, top_k=[1, 0, 7], top_p=[1.0, 0.3, 1.0])
    assert found.sum(1).tolist() == [1, int(kept_tokens(logits[0], top_p=0.3).sum()), 7]


@pytest.mark.parametrize(
    "case", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str
)
def test_draws_have_the_reference_distribution(case: dict, rng: np.random.Generator) -> None:
    """Chi-square of 16384 draws stays within five standard deviations of its mean; masked tokens are never drawn."""
    draws = 16384
    logits = (2 * rng.standard_normal(24)).astype(np.float32)
    masking = {name: value for name, value in case.items() if name != "temperature"}
    scaled = logits / case.get("temperature", 1.0)
    p = np.where(kept_tokens(scaled, **masking), np.exp(scaled.astype(np.float64) - scaled.max()), 0)
    p /= p.sum()
    fields = inputs(draws, seed=np.arange(draws) // 64, output_index=np.arange(draws) % 64, **case)
    count = np.bincount(np.asarray(sample(np.tile(logits, (draws, 1)), fields).token), minlength=24)
    assert not count[p == 0].any()
    common = p * draws >= 5
    chi_square = ((count - draws * p)[common] ** 2 / (draws * p[common])).sum()
    freedom = common.sum() - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


def test_sampling_on_a_gpu_launches_few_kernels() -> None:
    """The draw alone, and with the search: 2,154 before."""
    model = ModelConfig.from_dict(read_json(LLAMA_3_8B))
    config = EngineConfig(dtype="bfloat16", max_num_seqs=256, num_pages=100)
    spec = step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))
    count = {}
    for kind in ("cutoff", "sample"):
        make, shapes = AFTER_STEP[kind]
        compiled = compile_for(TARGETS["h200"], make(spec, 256), *shapes(spec, 256))
        count[kind] = launches(compiled.as_text())
        assert compiled.memory_analysis().temp_size_in_bytes < 2**22  # far less than a copy of the logits
    assert count["sample"] <= 10
    assert sum(count.values()) <= 15


def test_a_plain_row_draws_the_same_token_with_and_without_the_search(rng: np.random.Generator) -> None:
    rows = 2 * sampling.CHUNK_ROWS + 5
    logits = (3 * rng.standard_normal((rows, VOCAB))).astype(np.float32)
    logits[::5, ::7] = -np.inf
    plain = {"seed": np.arange(rows), "temperature": rng.choice([0.0, 0.3, 1.0, 50.0], rows), "min_p": 0.01}
    expected = draw(logits, greedy(logits), inputs(rows, **plain))
    restricted = np.arange(rows) % 2 == 0
    found = sample(logits, inputs(rows, **plain, top_k=np.where(restricted, 2, 0), top_p=np.where(restricted, 0.9, 1)))
    np.testing.assert_array_equal(found.token[~restricted], expected.token[~restricted])


def test_draw_depends_on_the_rows_own_inputs_only(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((8, VOCAB)).astype(np.float32)
    fields = {"seed": np.arange(8) + 5, "output_index": np.arange(8), "temperature": np.linspace(0, 2, 8)}
    together = np.asarray(sample(logits, inputs(8, **fields)).token)
    order = rng.permutation(8)
    moved = sample(logits[order], inputs(8, **{name: value[order] for name, value in fields.items()}))
    np.testing.assert_array_equal(np.asarray(moved.token), together[order])
    other = np.where(np.arange(8)[:, None] == 3, logits, rng.standard_normal((8, VOCAB))).astype(np.float32)
    assert np.asarray(sample(other, inputs(8, **fields)).token)[3] == together[3]


def test_greedy_rows_take_the_first_largest_logit() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, [9, 30]] = 4.0
    logits[2, 5] = 1.0
    token = np.asarray(sample(logits, inputs(3, temperature=[0, 1, 0], top_k=[0, 3, 1])).token)
    assert (token[0], token[2]) == (9, 5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1.2e-38, 1e-44, 1e-60])
def test_vanishing_temperature_is_greedy(temperature: float, rng: np.random.Generator) -> None:
    logits = (20 * rng.standard_normal((8, VOCAB))).astype(np.float32)
    token = np.asarray(sample(logits, inputs(8, temperature=temperature, seed=np.arange(8))).token)
    np.testing.assert_array_equal(token, logits.argmax(-1))


def test_logprobs_are_the_log_softmax_of_the_models_own_logits(rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((4, VOCAB))).astype(np.float32)
    result = sample(logits, inputs(4, temperature=0.7, top_k=5))
    wide = logits.astype(np.float64)
    expected = wide - wide.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    token = np.asarray(result.token)
    np.testing.assert_allclose(result.logprob, expected[np.arange(4), token], atol=1e-5)
    best = np.argsort(-expected, axis=-1)[:, :20]
    np.testing.assert_array_equal(result.top_token, best)
    np.testing.assert_allclose(result.top_logprob, np.take_along_axis(expected, best, -1), atol=1e-5)


def test_rows_that_are_not_finite_have_no_token_and_do_not_affect_others(rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((8, VOCAB))).astype(np.float32)
    fields = {"seed": np.arange(8), "temperature": [0.0, 1.0] * 4, "top_k": [0, 5, 0, 0, 0, 0, 5, 5]}
    expected = jax.tree.map(np.asarray, sample(logits, inputs(8, **fields)))
    bad = logits.copy()
    bad[0, 3] = bad[1, 4] = np.nan
    bad[2, 5] = bad[3, 6] = np.inf
    bad[4] = bad[5] = -np.inf
    found = sample(bad, inputs(8, **fields))
    np.testing.assert_array_equal(found.token, [-1] * 6 + expected.token[6:].tolist())
    np.testing.assert_array_equal(sampling.greedy(bad), [-1] * 6 + logits[6:].argmax(-1).tolist())
    np.testing.assert_array_equal(found.logprob[6:], expected.logprob[6:])
    np.testing.assert_array_equal(found.top_logprob[6:], expected.top_logprob[6:])


def test_logprobs_are_finite_where_a_token_is_impossible() -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, 4] = 1.0
    found = sample(logits, inputs(1, temperature=0))
    assert found.token[0] == 4 and found.logprob[0] == 0 and np.isfinite(found.top_logprob).all()


def test_seeded_tokens_do_not_depend_on_batch_slot_or_preemption(engine, tiny, squeeze) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    prompt = list(range(40, 60))
    params = SamplingParams(max_tokens=30, temperature=1.1, top_p=0.95, seed=1234, ignore_eos=True)
    alone = engine.generate([prompt], params, ["a"])[0].token_ids
    assert len(set(alone)) > 10

    noise = SamplingParams(max_tokens=37, temperature=0.9, ignore_eos=True)
    others = [[5] * n for n in (9, 2, 17)]
    last = engine.generate([*others, prompt], [noise] * 3 + [params], [None, "a", None, "a"])[-1]
    assert last.token_ids == alone

    before = engine.stats().preemptions
    with squeeze(engine, pages=26):
        batch = engine.generate([*others, prompt], [noise] * 3 + [params], [None, "a", None, "a"])
    assert batch[-1].metrics.preemptions > 0 and engine.stats().preemptions > before
    assert batch[-1].token_ids == alone


def test_seeds_make_streams_and_requests_without_one_differ(engine) -> None:
    params = [
        SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True, seed=seed) for seed in (1, 2, 1, None, None)
    ]
    tokens = [tuple(output.token_ids) for output in engine.generate([[7, 8]] * 5, params)]
    assert tokens[0] == tokens[2]
    assert len(set(tokens)) == 4


def test_greedy_request_is_unaffected_by_sampling_neighbours(engine) -> None:
    greedy = SamplingParams(max_tokens=20, ignore_eos=True)
    wild = SamplingParams(max_tokens=20, ignore_eos=True, temperature=2.0)
    alone = engine.generate([[3, 4, 5]], greedy)[0].token_ids
    assert engine.generate([[9], [3, 4, 5], [8] * 20], [wild, greedy, wild])[1].token_ids == alone


def test_engine_logprobs_fit_the_chosen_tokens(engine) -> None:
    output = engine.generate([[3, 4, 5]], SamplingParams(max_tokens=8, logprobs=3, ignore_eos=True))[0]
    assert len(output.logprobs) == 8
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entry.top) == 3 and entry.top[0] == (token, entry.logprob)  # greedy: the chosen token is the best
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    assert engine.generate([[3, 4, 5]], SamplingParams(max_tokens=2))[0].logprobs is None


@pytest.mark.parametrize("rows", [sampling.CHUNK_ROWS, sampling.CHUNK_ROWS + 1, 2 * sampling.CHUNK_ROWS + 5])
def test_rows_are_the_same_in_chunks_as_alone(rows: int, rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((rows, VOCAB))).astype(np.float32)
    fields = {
        "seed": np.arange(rows),
        "temperature": rng.choice([0.0, 0.7, 2.0], rows),
        "top_k": rng.choice([0, 5], rows),
        "top_p": rng.choice([1.0, 0.8], rows),
    }
    together = jax.tree.map(np.asarray, sample(logits, inputs(rows, **fields)))
    for row in range(rows):
        one = {name: value[row : row + 1] for name, value in fields.items()}
        alone = sample(logits[row : row + 1], inputs(1, **one))
        assert np.asarray(alone.token)[0] == together.token[row]
        np.testing.assert_array_equal(alone.top_token[0], together.top_token[row])
        np.testing.assert_allclose(alone.logprob[0], together.logprob[row], atol=1e-6)
