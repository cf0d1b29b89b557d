"""Log-probabilities of prompts, against the dense float64 reference."""

import numpy as np
import pytest
from dense_reference import dense_logits

from slora_jax import Engine, RequestOutput, SamplingParams
from slora_jax.adapters import LoraAdapter, random_adapter


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check(tiny, output: RequestOutput, adapter: LoraAdapter | None, count: int) -> None:
    prompt, (first, *rest) = output.prompt_token_ids, output.prompt_logprobs
    assert first is None and len(rest) == len(prompt) - 1
    expected = log_softmax(dense_logits(tiny.config, tiny.params, prompt, adapter))[:-1]
    np.testing.assert_allclose([one.logprob for one in rest], expected[np.arange(len(rest)), prompt[1:]], atol=1e-4)
    for one, row in zip(rest, expected, strict=True):
        values = [value for _, value in one.top]
        np.testing.assert_allclose(values, -np.sort(-row)[:count], atol=1e-4)
        np.testing.assert_allclose(values, [row[token] for token, _ in one.top], atol=1e-4)


@pytest.fixture
def adapters(engine: Engine, tiny) -> dict[str, LoraAdapter]:
    made = {name: random_adapter(tiny.geometry, rank, seed=rank) for name, rank in (("a", 3), ("b", 16))}
    for name, adapter in made.items():
        engine.load_adapter(name, adapter)
    return made


def test_mixed_batch_scores_prompts_and_does_not_change_other_requests(engine: Engine, tiny, adapters) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.config.vocab_size, n).tolist() for n in (1, 2, 17, 40, 61, 8, 33, 5)]
    names = [None, "a", "b", None, "a", "b", "a", None]
    scored = [SamplingParams(max_tokens=4, prompt_logprobs=n, ignore_eos=True) for n in (0, 3, 20, 1, 2, 5)]
    plain = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=5, logprobs=2)
    alone = [engine.generate([prompt], plain, [name])[0] for prompt, name in zip(prompts[6:], names[6:], strict=True)]
    outputs = engine.generate(prompts, [*scored, plain, plain], names)
    for output, params, name in zip(outputs[:6], scored, names, strict=False):
        check(tiny, output, adapters.get(name), params.prompt_logprobs)
        greedy = SamplingParams(max_tokens=4, ignore_eos=True)
        assert output.token_ids == engine.generate([output.prompt_token_ids], greedy, [name])[0].token_ids
    for output, expected in zip(outputs[6:], alone, strict=True):
        assert output.token_ids == expected.token_ids and output.prompt_logprobs is None


def test_more_scored_prompts_than_sequences_and_a_prefix_that_is_cached(engine: Engine, tiny, adapters) -> None:
    prompt = [7, *range(60, 90)]
    engine.generate([prompt], SamplingParams(max_tokens=2), ["a"])  # into the prefix cache
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    for output in engine.generate([prompt] * (engine.config.max_num_seqs + 3), params, "a"):
        check(tiny, output, adapters["a"], 1)
        assert output.metrics.cached_tokens == 0


def test_scores_survive_preemption(engine: Engine, tiny, adapters, squeeze) -> None:
    prompts = [list(range(first, first + 24)) for first in (10, 40, 70, 100)]
    params = SamplingParams(max_tokens=30, prompt_logprobs=2, ignore_eos=True)
    with squeeze(engine, pages=26):
        outputs = engine.generate(prompts, params, "a")
    assert sum(output.metrics.preemptions for output in outputs)
    for output in outputs:
        check(tiny, output, adapters["a"], 2)


def test_stream_has_prompt_logprobs_with_its_first_token(engine: Engine, tiny) -> None:
    first, *rest = engine.stream(list(range(20, 60)), SamplingParams(max_tokens=3, prompt_logprobs=1, ignore_eos=True))
    assert len(first.token_ids) == 1 and first.prompt_logprobs == rest[-1].output.prompt_logprobs
    assert all(delta.prompt_logprobs is None for delta in rest)
    check(tiny, rest[-1].output, None, 1)
