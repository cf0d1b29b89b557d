"""Embeddings of prompts are the pooled hidden states of transformers with PEFT."""

import numpy as np
import pytest
from tiny_model import MEDIUM, TinyModel

from slora_jax import ConfigError, SamplingParams
from slora_jax.adapters import random_adapter, write_peft

PROMPTS = [[5], [40, 41, 42], list(range(60, 100)), [7, 8] * 9]
TARGETS = ("q", "v", "down")
ADAPTERS = [None, "a", "a", None]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel):
    with tiny.engine(embeddings=True, **MEDIUM) as engine:  # as the server of the tests
        engine.load_adapter("a", random_adapter(tiny.geometry, 8, TARGETS, seed=1))
        yield engine
        engine.check()


@pytest.fixture(scope="module")
def hidden(tiny: TinyModel, model_dir, tmp_path_factory) -> list[np.ndarray]:
    """Hidden states after the final norm, `[tokens, d]` for each prompt, from transformers and PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    adapter = write_peft(tmp_path_factory.mktemp("peft") / "a", random_adapter(tiny.geometry, 8, TARGETS, seed=1))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    found = []
    for prompt, name in zip(PROMPTS, ADAPTERS, strict=True):
        (model.base_model.enable_adapter_layers if name else model.base_model.disable_adapter_layers)()
        with torch.no_grad():
            output = model(torch.tensor([prompt]), output_hidden_states=True)
        found.append(output.hidden_states[-1][0].numpy())
    return found


def test_embeddings_are_the_pooled_hidden_states_of_transformers(engine, hidden) -> None:
    """Prompts of one token, of several chunks, and with an adapter, in one batch; the second run may read prefixes."""
    for pooling, pooled in (("mean", [h.mean(0) for h in hidden]), ("last", [h[-1] for h in hidden])):
        for _ in range(2):
            found = engine.embed(PROMPTS, ADAPTERS, pooling, normalize=False)
            np.testing.assert_allclose(found, np.stack(pooled), atol=2e-4)
        unit = engine.embed(PROMPTS, ADAPTERS, pooling)
        np.testing.assert_allclose(unit, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=2e-5)


def test_embeddings_mix_with_generation_and_survive_preemption(engine, squeeze) -> None:
    generate = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)
    embed = SamplingParams(max_tokens=1, prompt_embedding="mean")
    expected_tokens = engine.generate([[9, 8]] * 2, generate)[0].token_ids
    expected = engine.embed(PROMPTS[2:], ADAPTERS[2:], "mean", normalize=False)
    with squeeze(engine, pages=21):
        outputs = engine.generate(
            [[9, 8], PROMPTS[2], [9, 8], PROMPTS[3]], [generate, embed, generate, embed], [None, "a", None, None]
        )
    assert [output.token_ids for output in outputs[::2]] == [expected_tokens] * 2
    np.testing.assert_allclose([output.prompt_embedding for output in outputs[1::2]], expected, atol=1e-5)
    assert outputs[0].prompt_embedding is None


def test_engine_without_embeddings_names_the_setting(tiny, shared_engine) -> None:
    with pytest.raises(ConfigError, match="EngineConfig.embeddings"):
        shared_engine.embed([[1, 2]])
    assert not any(bucket.pools for bucket in tiny.settings().buckets())
    with pytest.raises(ConfigError, match="None, 'mean' or 'last'"):
        SamplingParams(prompt_embedding="max")
