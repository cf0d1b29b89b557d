"""Parity with transformers and PEFT: mixed batches, chunked prefill, preemptions, evictions, reloads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slora_jax import Engine, EngineConfig, RequestOutput, SamplingParams

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402

torch.set_num_threads(1)

NEW_TOKENS = 64
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied-llama3-rope": (
        "llama",
        {"num_hidden_layers": 3, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral-window": ("mistral", {"sliding_window": 40, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
ON_TWO_DEVICES = "qwen2-on-two-devices"
FAMILIES[ON_TWO_DEVICES] = FAMILIES["qwen2"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "q-and-v-rank-3": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "mlp-only-rank-40-rslora": {
        "r": 40,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "patterns": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 21},
        "alpha_pattern": {"v_proj": 40, "layers.0.self_attn.o_proj": 3},
    },
    "last-layer-only": {"r": 17, "lora_alpha": 24, "target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
    "regex-rank-64": {
        "r": 64,
        "lora_alpha": 64,
        "target_modules": r".*\.layers\.0\.(self_attn\.(q|o)_proj|mlp\.up_proj)",
    },
    "rank-1-without-k": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}
PROMPT_LENGTHS = (1, 300, 17, 64, 129, 2, 16, 255, 33, 5, 100, 48, 1, 78, 31, 210)


@dataclass(frozen=True)
class Served:
    """One family's engine beside the PEFT model that it must agree with."""

    engine: Engine
    peft_model: Any
    prompts: list[list[int]]
    adapters: list[str | None]

    def run(self, order: np.ndarray) -> list[RequestOutput]:
        """The outputs, in the order of `prompts`, of the mixed batch submitted in `order`."""
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = self.engine.generate([self.prompts[i] for i in order], params, [self.adapters[i] for i in order])
        return [outputs[i] for i in np.argsort(order)]

    def reference(self, adapter: str | None) -> Any:
        """The PEFT model with this adapter active (None: the base model alone)."""
        if adapter is None:
            self.peft_model.base_model.disable_adapter_layers()
        else:
            self.peft_model.base_model.enable_adapter_layers()
            self.peft_model.set_adapter(adapter)
        return self.peft_model

    def check(self, outputs: list[RequestOutput]) -> None:
        """Float32 logits within 1e-4 of the largest, and the reference's greedy tokens, at every output position."""
        for output in outputs:
            ids = torch.tensor([output.prompt_token_ids + output.token_ids[:-1]])
            with torch.no_grad():
                logits = self.reference(output.adapter)(ids).logits[0, len(output.prompt_token_ids) - 1 :].numpy()
            where = f"{output.adapter}, prompt of {len(output.prompt_token_ids)}"
            assert logits.shape == output.logits.shape == (NEW_TOKENS, logits.shape[1])
            error = np.abs(output.logits - logits).max() / np.abs(logits).max()
            assert error <= 1e-4, f"{where}: logits differ by {error:.1e} of the largest"
            assert logits.argmax(-1).tolist() == output.token_ids, where


def make_base(family: str, overrides: dict[str, Any]) -> Any:
    """A random model in which context, rotation, biases and norms all show in the greedy tokens."""
    tiny = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **(tiny | overrides)), attn_implementation="eager"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.normal_(std=0.5)
            else:
                weight.normal_(std=1.0 if "embed" in name else 2 / weight.shape[1] ** 0.5)
    return model.float().eval()


def add_adapters(model: Any, directory: Path) -> Any:
    """Wraps the model with every adapter of the zoo, A and B random, and saves each as PEFT does."""
    wrapped = None
    for name, fields in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_A" in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
            elif "lora_B" in name:
                weight.normal_(std=0.5 * weight.shape[1] ** -0.5)
    wrapped.save_pretrained(directory)  # one folder per adapter
    return wrapped.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, overrides = FAMILIES[request.param]
    base = make_base(family, overrides)
    kv_width = base.config.num_key_value_heads * base.model.layers[0].self_attn.head_dim
    model_dir, adapter_dir = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("adapters")
    base.save_pretrained(model_dir)
    peft_model = add_adapters(base, adapter_dir)
    config = EngineConfig(
        dtype="float32",
        num_pages=60 if kv_width == 32 else 46,  # barely the longest request beside the largest adapter
        max_seqs=8,
        max_tokens_per_step=64,
        max_model_len=384,
        max_rank=64,
        decode_buckets=(8,),
        mixed_buckets=(64,),
        tp=2 if request.param == ON_TWO_DEVICES else 1,
        keep_logits=True,
        progress=False,
    )
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 512, length).tolist() for length in PROMPT_LENGTHS]
    names = [None, *ADAPTERS]
    with Engine.from_pretrained(model_dir, config) as engine:
        for name in ADAPTERS:
            engine.load_adapter(name, adapter_dir / name)
        yield Served(engine, peft_model, prompts, [names[i % len(names)] for i in range(len(prompts))])


def test_mixed_batch_matches_peft_under_preemption(served: Served) -> None:
    before = served.engine.stats()
    outputs = served.run(np.arange(len(served.prompts)))
    served.check(outputs)
    stats = served.engine.stats()
    assert stats.preemptions > before.preemptions, "the pool is too large to force preemption"
    assert np.median([len(set(output.token_ids)) for output in outputs]) > NEW_TOKENS // 4, (
        "greedy decoding is degenerate"
    )
    served.engine.check()


def test_matches_peft_after_many_evictions_and_reloads(served: Served) -> None:
    rng = np.random.default_rng(3)
    before = served.engine.stats()
    for _ in range(3):
        for name in rng.permutation(list(ADAPTERS)):  # beside a long prompt that crowds out the idle ones
            prompts = [served.prompts[1], [1, 2]]
            served.engine.generate(prompts, SamplingParams(max_tokens=2), [None, str(name)])
    served.check(served.run(rng.permutation(len(served.prompts))))
    stats = served.engine.stats()
    assert stats.adapter_evictions - before.adapter_evictions >= 2 * len(ADAPTERS)
    assert stats.adapter_loads - before.adapter_loads >= 2 * len(ADAPTERS)
    served.engine.check()


def test_every_adapter_changes_the_output_and_generate_agrees(served: Served) -> None:
    """The reference of the tests above is a forward pass over the engine's tokens; here it is PEFT's own `generate`."""
    prompt = served.prompts[2]
    names = [None, *ADAPTERS]
    outputs = served.engine.generate([prompt] * len(names), SamplingParams(max_tokens=24, ignore_eos=True), names)
    assert len({tuple(output.token_ids) for output in outputs}) == len(names)
    for output in outputs[::3]:
        ids = served.reference(output.adapter).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        assert ids[0, len(prompt) :].tolist() == output.token_ids, output.adapter
