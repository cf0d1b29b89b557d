"""Parity with transformers and PEFT: mixed batches, chunked prefill, preemptions, evictions, reloads."""

from typing import Any

import numpy as np
import pytest

from slora_jax import SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from peft_families import ADAPTERS, FAMILIES, NEW_TOKENS  # noqa: E402


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, peft_servers: Any) -> Any:
    return peft_servers.served(request.param)


def test_mixed_batch_matches_peft_under_preemption(served: Any) -> None:
    outputs = served.mixed_batch
    served.family.check(outputs)
    stats = served.engine.stats()
    assert stats.preemptions > 0, "the pool is too large to force preemption"
    assert stats.adapter_evictions > 0, "the pool is too large to force evictions"
    assert np.median([len(set(output.token_ids)) for output in outputs]) > NEW_TOKENS // 4, (
        "greedy decoding is degenerate"
    )
    served.engine.check()


@pytest.mark.parametrize("served", ["llama-mha-untied", "qwen3"], indirect=True, scope="module")  # tiles of two widths
def test_matches_peft_after_many_evictions_and_reloads(served: Any) -> None:
    rng = np.random.default_rng(3)
    before = served.engine.stats()
    for _ in range(3):
        for name in rng.permutation(list(ADAPTERS)):  # beside a long prompt that evicts idle ones
            prompts = [served.family.prompts[1], [1, 2]]
            served.engine.generate(prompts, SamplingParams(max_tokens=2), [None, str(name)])
    served.family.check(served.run(rng.permutation(len(served.family.prompts))))
    stats = served.engine.stats()
    assert stats.adapter_evictions - before.adapter_evictions >= 2 * len(ADAPTERS)
    assert stats.adapter_loads - before.adapter_loads >= 2 * len(ADAPTERS)
    served.engine.check()


def test_every_adapter_changes_the_output_and_generate_agrees(served: Any) -> None:
    """The tests above compare with a forward pass over the engine's tokens, this one with PEFT's `generate`."""
    prompt = served.family.prompts[2]
    names = [None, *ADAPTERS]
    outputs = served.engine.generate([prompt] * len(names), SamplingParams(max_tokens=24, ignore_eos=True), names)
    assert len({tuple(output.token_ids) for output in outputs}) == len(names)
    for output in outputs[::3]:
        ids = served.family.active(output.adapter).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        assert ids[0, len(prompt) :].tolist() == output.token_ids, output.adapter
