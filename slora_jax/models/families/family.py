"""The description of one architecture, and the fields that every architecture has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slora_jax.models.fields import Fields, refused, token_ids
from slora_jax.models.quantised_config import checkpoint_format
from slora_jax.models.rope_fields import read_rope

Sizes = dict[str, Any]
"""The fields of `ModelConfig` that `Family.read` reads for every family."""

_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
"""Values of missing fields in most families of transformers."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """One architecture: how its `config.json` is read, and the names of its tensors.

    Attributes:
      name: its `model_type`.
      architecture: its class in transformers, as in `architectures`.
      traits: reads the family's own fields. Takes the fields and the sizes; returns further fields of `ModelConfig`.
      defaults: transformers' values of fields that a file lacks.
      implied: switches that may be true in a file, because the feature is always on.
      activation: the field that names the activation, and the values that the family supports.
      partial_rotary: share of a head that is rotated if the file names none; None: whole heads, and no other share is
        supported.
      interleaved_rotary: see `RopeConfig.interleaved`.
      norms: the decoder's norms of a layer -> their modules in the checkpoint.
      norm_offset: what the decoder adds to each norm's scale in the checkpoint.
      fused: stack -> the module that holds it as one tensor, in layers without experts.
      router, expert: modules of the router, and of a projection ("gate", "up", "down") of expert `{expert}`.
      text_config: whether the file's fields are those of its `text_config`, and its other tensors are not of text.
    """

    name: str
    architecture: str
    traits: Callable[[Fields, Sizes], dict[str, Any]] = lambda fields, sizes: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: frozenset[str] = frozenset()
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu",))
    partial_rotary: float | None = None
    interleaved_rotary: bool = False
    norms: Mapping[str, str] = field(
        default_factory=lambda: {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    )
    norm_offset: float = 0.0
    fused: Mapping[str, str] = field(default_factory=dict)
    router: str = ""
    expert: Mapping[str, str] = field(default_factory=dict)
    text_config: bool = False

    def read(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `ModelConfig` for the content of a `config.json`. Warns of unknown fields.

        Raises:
          UnsupportedModelError: names the field, its value, and the supported values.
        """
        architectures = hf_config.get("architectures")
        if architectures is not None and list(architectures) != [self.architecture]:
            raise refused("architectures", architectures, f"[{self.architecture!r}]")
        if self.text_config:
            hf_config = _text_config(hf_config)
        fields = Fields(hf_config, {**_DEFAULTS, **self.defaults})
        fields.get("architectures")
        sizes = self._sizes(fields)
        traits = self.traits(fields, sizes)
        if "window_layers" not in traits:
            layers = sizes["num_layers"]
            if (kinds := fields.get("layer_types")) is not None and list(kinds) != ["full_attention"] * layers:
                raise refused("layer_types", kinds, f'"full_attention" for each of the {layers} layers')
        if "rope" not in traits:
            traits["rope"] = read_rope(
                fields,
                sizes["max_position_embeddings"],
                sizes["head_dim"],
                partial=self.partial_rotary,
                interleaved=self.interleaved_rotary,
            )
        name, supported = self.activation
        if (form := checkpoint_format(fields.given)) is not None:
            fields.get("quantization_config")
            traits["weights"] = form.weights
        traits["activation"] = fields.choice(name, {value: _ACTIVATIONS[value] for value in supported})
        fields.check_rest(self.implied)
        return {"family": self.name, **sizes, **traits}

    def _sizes(self, fields: Fields) -> Sizes:
        fields.get("model_type")
        hidden_size, num_heads = fields.positive_int("hidden_size"), fields.positive_int("num_attention_heads")
        num_kv_heads = num_heads
        if fields.get("num_key_value_heads") is not None:
            num_kv_heads = fields.positive_int("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
        if fields.get("head_dim") is not None:
            head_dim = fields.positive_int("head_dim")
        elif hidden_size % num_heads:
            raise refused("hidden_size", hidden_size, f"a multiple of num_attention_heads={num_heads}")
        else:
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise refused("head_dim", head_dim, "an even number (rotary embedding rotates pairs)")
        return {
            "vocab_size": fields.positive_int("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": fields.positive_int("intermediate_size"),
            "num_layers": fields.positive_int("num_hidden_layers"),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": fields.positive_number("rms_norm_eps"),
            "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
            "max_position_embeddings": fields.positive_int("max_position_embeddings"),
            "eos_token_ids": token_ids(fields.get("eos_token_id")),
        }


def _text_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model of text and images that concern text."""
    given = hf_config.get("text_config")
    if not isinstance(given, Mapping):
        raise refused("text_config", given, "a dictionary")
    outer = {name: hf_config.get(name) for name in ("quantization_config", "compression_config")}
    ends = hf_config.get("eos_token_id") or given.get("eos_token_id")
    return {**given, **outer, "architectures": None, **({} if ends is None else {"eos_token_id": ends})}


def bias_traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    """Reads the biases of all attention projections."""
    bias = fields.boolean("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}
