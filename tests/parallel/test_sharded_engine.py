"""An engine over several devices gives PEFT's logits and tokens, greedy and sampled, and those of one device, under
preemption and evictions, with ranks that the devices do not divide.

Of two KV heads, neighbours among 4 or 8 shards hold the same one. `test_family_parity` divides them.
"""

from typing import Any

import jax
import numpy as np
import pytest

from slora_jax import SamplingParams

pytest.importorskip("torch")
pytest.importorskip("peft")
from peft_families import ADAPTERS, PROMPT_LENGTHS, assert_close

NEW_TOKENS = 20
GQA = "llama-gqa-tied-biased-llama3-rope"
# Family, shards, and the first device if it is not 0.
CUT = [(GQA, 8), ("mistral-window", 4, 4), ("qwen3", 4)]
IN_ORDER = np.arange(len(PROMPT_LENGTHS))


@pytest.fixture(scope="module", params=CUT, ids=lambda case: f"{case[0]}-tp{case[1]}")
def cut(request: pytest.FixtureRequest, peft_servers: Any) -> Any:
    return peft_servers.served(*request.param)


@pytest.fixture(scope="module")
def gqa(peft_servers: Any) -> Any:
    return peft_servers.served(GQA, 8)


@pytest.fixture(scope="module")
def sampled_on_one_device(peft_servers: Any) -> Any:
    return sampled(peft_servers.served(GQA))


def sampled(served: Any) -> Any:
    params = [
        SamplingParams(
            max_tokens=8, temperature=0.8 * (i % 3), top_k=20, top_p=0.9, seed=i, logprobs=3, logit_bias={i: 2.0}
        )
        for i in range(len(PROMPT_LENGTHS))
    ]
    return served.engine.generate(served.family.prompts, params, served.family.adapters)


def test_logits_and_greedy_tokens_are_those_of_peft_and_of_one_device(cut: Any, peft_servers: Any) -> None:
    family, engine = cut.family, cut.engine
    on_one_device = peft_servers.served(family.name).mixed_batch
    before = engine.stats()
    for order in (IN_ORDER, np.random.default_rng(1).permutation(IN_ORDER)):
        outputs = cut.run(order, NEW_TOKENS)
        family.check(outputs)
        for output, expected in zip(outputs, on_one_device, strict=True):
            assert output.token_ids == expected.token_ids[:NEW_TOKENS], output.adapter
            assert_close(output, expected.logits[:NEW_TOKENS])
    stats = engine.stats()
    assert stats.preemptions > before.preemptions, "the pool is too large to force preemption"
    assert stats.adapter_evictions - before.adapter_evictions >= len(ADAPTERS), "the pool is too large for churn"
    engine.check()


def test_sampled_tokens_and_logprobs_are_those_of_one_device(gqa: Any, sampled_on_one_device: Any) -> None:
    for output, expected in zip(sampled(gqa), sampled_on_one_device, strict=True):
        assert output.token_ids == expected.token_ids
        for one, other in zip(output.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_reloaded_adapters_give_the_same_tokens(gqa: Any) -> None:
    """A name gets other weights and then its own again; in between its pages belong to others."""
    family, engine = gqa.family, gqa.engine
    for name, other in (("patterns", "rank-1-without-k"), ("q-and-v-rank-3", "regex-rank-64")):
        engine.load_adapter(name, family.adapter_dir / other)
        prompts = [family.prompts[i] for i in (4, 5)]
        engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), [name, None])
        engine.load_adapter(name, family.adapter_dir / name)
    family.check(gqa.run(IN_ORDER, NEW_TOKENS))
    engine.check()


def test_two_groups_of_devices_serve_side_by_side(peft_servers: Any) -> None:
    """Two engines on different devices step in turn."""
    groups = [peft_servers.served("qwen3", 4), peft_servers.served("mistral-window", 4, 4)]
    params, found = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True), ({}, {})
    for group in groups:
        for i, (prompt, adapter) in enumerate(zip(group.family.prompts, group.family.adapters, strict=True)):
            group.engine.add_request(prompt, params, adapter, request_id=str(i))
    while any(group.engine.has_work() for group in groups):
        for group, outputs in zip(groups, found, strict=True):
            outputs |= {delta.request_id: delta.output for delta in group.engine.step() if delta.output}
    for group, outputs in zip(groups, found, strict=True):
        assert len(outputs) == len(group.family.prompts)
        group.family.check(list(outputs.values()))
    pools = [group.engine.executor.device.pool[0] for group in groups]
    devices = [{shard.device for shard in pool.addressable_shards} for pool in pools]
    assert [len(group) for group in devices] == [4, 4]
    assert not devices[0] & devices[1]


def test_each_device_holds_only_its_shard(cut: Any) -> None:
    worker, tp = cut.engine.executor.device, cut.engine.config.tensor_parallel_size
    for layer in worker.pool:
        assert {shard.data.shape for shard in layer.addressable_shards} == {(*layer.shape[:3], layer.shape[3] // tp)}
    width, kv_heads = cut.family.head_dim, cut.family.kv_heads
    assert worker.pool[0].shape[3] == width * max(tp, kv_heads)  # more shards than KV heads: some heads are held twice
    matrices = [leaf for leaf in jax.tree.leaves(worker.params) if leaf.ndim == 2]
    for leaf in matrices:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // tp}
    assert len({shard.device for shard in matrices[0].addressable_shards}) == tp
