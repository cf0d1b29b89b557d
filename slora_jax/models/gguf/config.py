"""Converts the metadata of a GGUF file to the fields of a Hugging Face `config.json`."""

import logging
from collections.abc import Mapping
from typing import Any

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models.gguf.header import GgufHeader

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, float32 `[head_dim / 2]`: llama.cpp's form of Llama 3's rope scaling."""

GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_READ = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "attention.value_length", "block_count", "context_length", "embedding_length",
    "feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor",
    "rope.scaling.type", "vocab_size",
}  # fmt: skip
_HARMLESS = {
    "attention.layer_norm_epsilon", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier", "tensor_data_layout",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}
"""Keys that can change the computation -> values that leave it unchanged."""

_LOG = logging.getLogger(__name__)


def hf_config(header: GgufHeader) -> dict[str, Any]:
    """The fields of an equivalent `config.json`.

    Raises `UnsupportedModelError` for an unsupported architecture or value, `CheckpointError` for a key that is missing
    or of the wrong type.
    """
    family = header.metadata.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise _refused(header, "general.architecture", family, f"one of {sorted(GGUF_FAMILIES)}")
    fields = _Fields(header, f"{family}.")
    fields.check_names()
    width, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    context = fields.integer("context_length")
    head_dim = fields.integer("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := fields.integer(key, head_dim)) != head_dim:
            raise _refused(header, family + "." + key, value, f"the size of a head, {head_dim}")
    if 0 < (window := fields.integer("attention.sliding_window", 0)) < context:
        raise _refused(header, f"{family}.attention.sliding_window", window, f"0, or {context}, the context, or more")
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}  # always present in Qwen2's attention
    found = {field for field, tensor in biases.items() if f"blk.0.{tensor}.bias" in header.tensors}
    return {
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": fields.integer("vocab_size", len(header.metadata.get("tokenizer.ggml.tokens", ()))),
        "max_position_embeddings": context,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, fields),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "sliding_window": None,
        "eos_token_id": _end_tokens(header.metadata),
        **dict.fromkeys(found - ({"attention_bias"} if family == "qwen2" else set()), True),
    }


def rope_factors(header: GgufHeader) -> tuple[float, ...]:
    """The values of `rope_freqs.weight`; empty if the file has no such tensor."""
    if (tensor := header.tensors.get(ROPE_FACTORS)) is None:
        return ()
    if tensor.type_id != 0 or len(tensor.shape) != 1:
        raise CheckpointError(f"{header.file}: tensor {ROPE_FACTORS}: expected float32 numbers in one dimension")
    import numpy as np

    factors = np.fromfile(header.file, "<f4", tensor.shape[0], offset=tensor.offset)
    if factors.shape != tensor.shape or not (factors > 0).all():
        raise CheckpointError(f"{header.file}: tensor {ROPE_FACTORS}: truncated, or a factor is not positive")
    return tuple(factors.tolist())


class _Fields:
    """Reads and checks the metadata keys of one architecture."""

    def __init__(self, header: GgufHeader, prefix: str) -> None:
        self._header, self._prefix = header, prefix

    def check_names(self) -> None:
        """Rejects keys that would change the computation; logs one warning for all unknown keys."""
        unknown = []
        for key, value in self._header.metadata.items():
            name = key.removeprefix(self._prefix)
            if name == key or name in _READ or name in _HARMLESS:
                continue
            if name not in _NEUTRAL:
                unknown.append(f"{key}={value!r}")
            elif value not in _NEUTRAL[name]:
                raise _refused(self._header, key, value, " or ".join(map(repr, _NEUTRAL[name])))
        if unknown:
            _LOG.warning("%s: metadata not known here and ignored: %s", self._header.file, ", ".join(unknown))

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{self._header.file}: {self._prefix}{name}={value!r} is not a count")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self._header.file}: {self._prefix}{name}={value!r} is not a number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        return str(self._get(name, default))

    def _get(self, name: str, default: Any) -> Any:
        value = self._header.metadata.get(self._prefix + name, default)
        if value is None:
            raise CheckpointError(f"{self._header.file}: metadata {self._prefix}{name} is missing")
        if hasattr(value, "tolist"):  # one value for each layer
            if not value.size or (value != value[0]).any():
                raise _refused(self._header, self._prefix + name, value.tolist(), "the same value in every layer")
            return value[0].item()
        return value


def _rope(header: GgufHeader, fields: _Fields) -> dict[str, Any]:
    """The field `rope_parameters`. As in llama.cpp, a factor without a type scales linearly."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10000.0)}
    kind = fields.text("rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    if kind not in ("none", "linear"):
        key = f"{header.metadata['general.architecture']}.rope.scaling.type"
        raise _refused(header, key, kind, "'none' or 'linear'")
    if kind == "linear" and factor not in (0.0, 1.0):
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Token ids that end an answer: end of sequence and, in a chat model, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(metadata[key] for key in keys if key in metadata))


def _refused(header: GgufHeader, key: str, value: Any, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{header.file}: {key}={value!r} is not supported; supported: {supported}")
