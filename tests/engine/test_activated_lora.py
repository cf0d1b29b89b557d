"""Activated LoRA (aLoRA) against PEFT: it acts from its invocation tokens on, and shares the KV before them."""

from dataclasses import replace

import numpy as np
import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.errors import RequestError

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from peft_families import CONFIG, FAMILIES, SeparateAdapters, Served  # noqa: E402

INVOCATION = [7, 11, 7]
KINDS = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "activated": {"r": 8, "target_modules": "all-linear", "alora_invocation_tokens": INVOCATION},
    "other": {"r": 3, "target_modules": ["k_proj", "v_proj"], "alora_invocation_tokens": INVOCATION},
}
LENGTHS = (20, 300, 17, 129, 16, 70, 100, 5, 78, 31)


class Activated(SeparateAdapters):
    """Prompts with an adapter contain the invocation tokens once, twice, or overlapping."""

    def __init__(self, directory):
        super().__init__(directory, *FAMILIES["llama-mha-untied"], KINDS, LENGTHS)
        for number, (prompt, adapter) in enumerate(zip(self.prompts, self.adapters, strict=True)):
            if adapter is not None:
                at = len(prompt) // 2
                prompt[at : at + 3] = INVOCATION
                if number % 3 == 0:
                    prompt[at - 2 : at + 1] = INVOCATION
                if number % 3 == 1:
                    prompt[:3] = INVOCATION

    def logits(self, adapter, ids):
        key = adapter, tuple(ids)
        if key not in self._logits:
            given = {}
            if adapter in ("activated", "other"):
                start = max(i for i in range(self.prompt_length - 2) if ids[i : i + 3] == INVOCATION)
                given["alora_offsets"] = [len(ids) - start]
            with torch.no_grad():
                self._logits[key] = self.active(adapter)(torch.tensor([ids]), **given).logits[0].numpy()
        return self._logits[key]

    def check(self, outputs):
        for output in outputs:
            self.prompt_length = len(output.prompt_token_ids)
            super().check([output])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    family = Activated(tmp_path_factory.mktemp("activated"))
    config = replace(CONFIG, num_pages=46, prefix_cache=True)  # the shape of `PeftServers`
    with Engine.from_pretrained(family.model_dir, config) as engine:
        for name in KINDS:
            engine.load_adapter(name, family.adapter_dir / name)
        yield Served(family, engine)


def test_mixed_batch_matches_peft_under_preemption(served):
    served.family.check(served.mixed_batch)
    assert served.engine.stats().preemptions > 0, "the pool is too large to force preemption"
    served.family.check(served.run(np.arange(len(LENGTHS))[::-1], max_tokens=8))  # with cached prefixes
    served.engine.check()


def test_kv_before_the_invocation_is_shared_with_the_base_and_other_adapters(served):
    engine, shared = served.engine, np.random.default_rng(5).integers(20, 500, 70).tolist()
    prompt, params = [*shared, *INVOCATION, *range(100, 130)], SamplingParams(max_tokens=4, ignore_eos=True)

    def cached(adapter):
        (output,) = engine.generate([prompt], params, adapter)
        served.family.check([output])
        return output.metrics.cached_tokens

    assert cached(None) == 0
    assert cached("activated") == cached("other") == 64  # pages before the one of position 70
    assert cached("activated") == cached(None) == 96
    assert cached("plain") == 0
    before = engine.prefixes.pages().size
    engine.unload_adapter("activated")
    assert before - engine.prefixes.pages().size == 2  # its own pages, from position 64 on
    engine.check()
    engine.load_adapter("activated", served.family.adapter_dir / "activated")
    assert cached("activated") == 64


def test_prompt_without_the_invocation_is_refused(served):
    with pytest.raises(
        RequestError, match=r"adapter='other': acts from its invocation tokens \[7, 11, 7\] on, which the "
    ):
        served.engine.add_request([1, 7, 11, 5], adapter="other")
