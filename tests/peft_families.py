"""Random models of every family with PEFT adapters of all kinds, their logits by PEFT, and engines to compare."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from slora_jax import Engine, EngineConfig, RequestOutput, SamplingParams

torch.set_num_threads(1)

VOCAB = 509  # not divisible by the number of devices
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
    "llama-mha-untied": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa-tied-biased-llama3-rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 40, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
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
CONFIG = EngineConfig(
    dtype="float32",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=384,
    max_lora_rank=64,
    decode_buckets=(8,),
    mixed_buckets=(64,),
    keep_logits=True,
    compile_ahead=False,
    progress=False,
)


class PeftFamily:
    """A random model with all adapters, in memory and as saved by transformers and PEFT."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        kind, overrides = FAMILIES[name]
        base = make_base(kind, overrides)
        self.model_dir, self.adapter_dir = directory / "model", directory / "adapters"
        base.save_pretrained(self.model_dir)
        self.kv_heads, self.head_dim = base.config.num_key_value_heads, base.model.layers[0].self_attn.head_dim
        self.peft_model = add_adapters(base, self.adapter_dir)
        rng = np.random.default_rng(2)
        self.prompts = [rng.integers(0, VOCAB, length).tolist() for length in PROMPT_LENGTHS]
        names = [None, *ADAPTERS]
        self.adapters: list[str | None] = [names[i % len(names)] for i in range(len(self.prompts))]
        self._logits: dict[tuple[str | None, tuple[int, ...]], np.ndarray] = {}

    def active(self, adapter: str | None) -> Any:
        """Returns the PEFT model with this adapter active (None: the base model)."""
        if adapter is None:
            self.peft_model.base_model.disable_adapter_layers()
        else:
            self.peft_model.base_model.enable_adapter_layers()
            self.peft_model.set_adapter(adapter)
        return self.peft_model

    def logits(self, adapter: str | None, ids: list[int]) -> np.ndarray:
        """Returns PEFT's logits `[len(ids), vocab]`, computed once for all prefixes of the same ids."""
        for (known, longer), logits in self._logits.items():
            if known == adapter and longer[: len(ids)] == tuple(ids):
                return logits[: len(ids)]
        with torch.no_grad():
            logits = self.active(adapter)(torch.tensor([ids])).logits[0].numpy()
        self._logits[adapter, tuple(ids)] = logits
        return logits

    def check(self, outputs: list[RequestOutput]) -> None:
        """Checks at every output position: logits within 1e-4 of the largest, and PEFT's greedy token."""
        for output in outputs:
            prompt, tokens = output.prompt_token_ids, output.token_ids
            logits = self.logits(output.adapter, prompt + tokens[:-1])[len(prompt) - 1 :]
            assert_close(output, logits)
            assert logits.argmax(-1).tolist() == tokens, f"{output.adapter}, prompt of {len(prompt)}"


class SeparateAdapters(PeftFamily):
    """A random model, and a PEFT model of its own for each adapter: PEFT cannot mix some kinds in one model."""

    def __init__(
        self,
        directory: Path,
        kind: str,
        overrides: dict[str, Any],
        adapters: dict[str, dict[str, Any]],
        prompt_lengths: tuple[int, ...],
    ) -> None:
        self.name = directory.name
        self.model_dir, self.adapter_dir = directory / "model", directory / "adapters"
        self._models = {None: make_base(kind, overrides)}
        self._models[None].save_pretrained(self.model_dir)
        for seed, (name, fields) in enumerate(adapters.items()):
            config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
            model = peft.get_peft_model(make_base(kind, overrides), config).eval()
            torch.manual_seed(seed)
            train(model)
            model.save_pretrained(self.adapter_dir / name)
            self._models[name] = model
        rng = np.random.default_rng(2)
        self.prompts = [rng.integers(0, VOCAB, length).tolist() for length in prompt_lengths]
        names = [None, *adapters]
        self.adapters = [names[i % len(names)] for i in range(len(self.prompts))]
        self._logits = {}

    def add(self, name: str, directory: Path, kind: str, overrides: dict[str, Any]) -> None:
        """Adds an adapter that PEFT reads from a directory."""
        self._models[name] = peft.PeftModel.from_pretrained(make_base(kind, overrides), directory).eval()

    def active(self, adapter: str | None) -> Any:
        return self._models[adapter]


@torch.no_grad()
def train(model: Any) -> None:
    """Gives the trainable weights of a PEFT model random values, as if trained."""
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if "magnitude" in name:
            weight.mul_(torch.empty_like(weight).uniform_(0.6, 1.4))
        elif "modules_to_save" in name:  # a few rows
            weight[::50] += torch.randn_like(weight[::50])
        elif "trainable_tokens" in name or "lora_embedding_A" in name:
            weight.normal_()
        elif weight.ndim == 1:
            weight.normal_(std=0.5)
        elif "lora_A" in name:
            weight.normal_(std=weight.shape[1] ** -0.5)
        else:
            weight.normal_(std=0.5 * weight.shape[1] ** -0.5)


def assert_close(output: RequestOutput, logits: np.ndarray) -> None:
    """Checks that the output's logits are within 1e-4 of the largest of `logits [tokens, vocab]`."""
    assert output.logits.shape == logits.shape == (len(output.token_ids), VOCAB)
    error = np.abs(output.logits - logits).max() / np.abs(logits).max()
    where = f"{output.adapter}, prompt of {len(output.prompt_token_ids)}"
    assert error <= 1e-4, f"{where}: logits differ by {error:.1e} of the largest"


@dataclass(frozen=True)
class Served:
    """A family's engine and the PEFT model that it must agree with."""

    family: PeftFamily
    engine: Engine

    def run(self, order: np.ndarray, max_tokens: int = NEW_TOKENS) -> list[RequestOutput]:
        """Serves all prompts in one batch, submitted in `order`. Returns outputs in the order of the prompts."""
        family, params = self.family, SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        adapters = [family.adapters[i] for i in order]
        outputs = self.engine.generate([family.prompts[i] for i in order], params, adapters)
        return [outputs[i] for i in np.argsort(order)]

    @cached_property
    def mixed_batch(self) -> list[RequestOutput]:
        """Outputs of all prompts at once, in a pool that is too small for them."""
        return self.run(np.arange(len(self.family.prompts)))


class PeftServers:
    """Families and engines, each made at its first use and kept for the session."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._engines: list[Engine] = []
        self.family = cache(self._family)
        self.served = cache(self._served)

    def _family(self, name: str) -> PeftFamily:
        return PeftFamily(name, self._directory / name)

    def _served(self, name: str, tp: int = 1, first_device: int = 0) -> Served:
        """The family's engine over `tp` devices; its pool barely holds the longest request beside the largest
        adapter."""
        family = self.family(name)
        pages = 60 if family.kv_heads * family.head_dim == 32 else 46
        config = replace(CONFIG, num_pages=pages, tensor_parallel_size=tp, tp_first_device=first_device)
        engine = Engine.from_pretrained(family.model_dir, config)
        self._engines.append(engine)
        for adapter in ADAPTERS:
            engine.load_adapter(adapter, family.adapter_dir / adapter)
        return Served(family, engine)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def make_base(family: str, overrides: dict[str, Any]) -> Any:
    """Returns a random model whose greedy tokens depend on context, rotation, biases and norms."""
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **(tiny | overrides)), attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
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


def add_adapters(model: Any, directory: Path, adapters: dict[str, dict[str, Any]] = ADAPTERS) -> Any:
    """Wraps the model with adapters, A and B random, and saves each with PEFT."""
    wrapped = None
    for name, fields in adapters.items():
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
