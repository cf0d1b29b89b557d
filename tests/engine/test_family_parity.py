"""Every family gives the logits and greedy tokens of transformers and PEFT: base rows and adapters in one batch,
prompts in chunks, longer than the windows, preempted, the adapter evicted and loaded again; some of them through the
server too."""

import asyncio
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.memory import Immediate
from slora_jax.serving.settings import ServerSettings

pytest.importorskip("torch")
pytest.importorskip("peft")
from borrowed_engine import serving
from peft_families import VOCAB, assert_close
from small_families import FAMILIES, SmallFamily

PROMPT_LENGTHS = (10, 45, 15, 30)
ADAPTERS = (None, "tuned", "tuned", "tuned")  # no step is without one: all run the same programs
NEW_TOKENS = 64
SERVED = ("gemma3_text", "phi3", "qwen3_moe")  # through HTTP too
CONFIG = EngineConfig(
    dtype="float32",
    num_pages=27,  # too few for the adapter and all sequences, enough for it and the first two
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=112,
    max_lora_rank=8,
    decode_buckets=(4,),
    mixed_buckets=(16,),
    keep_logits=True,
    compile_ahead=False,
    progress=False,
)


def check(family: SmallFamily, config: EngineConfig, decodes: bool = True, over_http: bool = False) -> None:
    """Serves a mixed batch and compares it at every output position.

    Args:
      decodes: whether sequences decode, are preempted, and the adapter is evicted and used again. False: more prompts,
        and one token of each, so that no decode program is compiled.
      over_http: whether the server answers all requests after the eviction, or the engine one.
    """
    rng = np.random.default_rng(5)
    repeats = 1 if decodes else 3
    prompts = [rng.integers(2, VOCAB, length).tolist() for length in PROMPT_LENGTHS * repeats]
    params = SamplingParams(max_tokens=NEW_TOKENS if decodes else 1, ignore_eos=True)
    with Engine.from_pretrained(family.model_dir, config, eviction=Immediate()) as engine:
        engine.load_adapter("tuned", family.adapter_dir)
        outputs = engine.generate(prompts, params, list(ADAPTERS) * repeats)
        if over_http:
            tokens = asyncio.run(completions(engine, prompts, params))
            assert tokens == [output.token_ids for output in outputs]
        elif decodes:
            outputs += engine.generate(prompts[1], params, "tuned")
        if decodes:
            stats = engine.stats()
            assert stats.preemptions > 0, "the pool is too large to force preemption"
            assert stats.adapter_evictions > 0
            assert stats.adapter_loads > 1
        engine.check()
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.token_ids
        logits = family.logits(output.adapter, prompt + tokens[:-1])[len(prompt) - 1 :]
        assert_close(output, logits)
        assert logits.argmax(-1).tolist() == tokens


async def completions(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Returns the greedy tokens that the server's endpoint gives for each prompt and its adapter, asked at once."""
    settings = ServerSettings(Path(), name="base", engine=engine.config)
    async with serving(engine, settings) as (_, http):

        async def tokens(prompt: list[int], adapter: str | None) -> list[int]:
            ask = {"prompt": prompt, "max_tokens": params.max_tokens, "temperature": 0, "ignore_eos": True}
            body = ask | {"model": adapter or "base", "return_token_ids": True}
            answer = await http.post("/v1/completions", json=body, timeout=60)
            return answer.json()["choices"][0]["token_ids"]

        return await asyncio.gather(*map(tokens, prompts, ADAPTERS))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that makes the family of a name, once."""
    return cache(lambda name: SmallFamily(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral"])  # test_parity_peft serves Mistral
def test_mixed_batch_matches_transformers_and_peft(name: str, family: Any) -> None:
    check(family(name), CONFIG, over_http=name in SERVED)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "glm4", "mixtral"])
def test_two_shards_match_transformers_and_peft(name: str, family: Any) -> None:
    check(family(name), replace(CONFIG, num_pages=80, tensor_parallel_size=2), decodes=False)


def test_norms_over_the_whole_width_are_not_sharded(family: Any) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: the model's qk_norm='width'"):
        Engine.from_pretrained(family("olmo2").model_dir, replace(CONFIG, tensor_parallel_size=2))


def test_adapters_of_experts_are_refused(family: Any) -> None:
    with Engine.from_pretrained(family("mixtral").model_dir, CONFIG) as engine:
        adapter = random_adapter(engine.store.geometry, {"q": 4, "down": 4}, seed=0)
        with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.down_proj: layer 0 of the base model has experts"):
            engine.load_adapter("experts", adapter)
