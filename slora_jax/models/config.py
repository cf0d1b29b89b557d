"""Model configuration: a Hugging Face `config.json` or the metadata of a GGUF file.

A field that would change the computation is honoured or rejected by name (`config_fields`). Other fields are ignored;
one warning names the unknown ones. `families` has one file per architecture.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models.families.registry import family_of
from slora_jax.models.fields import token_ids
from slora_jax.models.gguf.config import ROPE_FACTORS, hf_config, rope_factors
from slora_jax.models.gguf.header import gguf_file, read_header
from slora_jax.models.traits import Activation, Experts, LayerKind, Norms, QkNorm, RopeConfig, WeightFormat


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and sizes of a checkpoint. Hashable, so it can be a static argument of `jax.jit`.

    The defaults of all traits are Llama's.

    Attributes:
      intermediate_size: width of the hidden layer of a feed-forward part without experts.
      max_position_embeddings: the longest sequence, in tokens.
      qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
      qk_norm: norm of queries and keys, before they are rotated; None: no norm.
      sliding_window: keys that a query attends to in local layers, including its own; None: all.
      window_layers: whether each layer is local; empty: all are.
      local_rope: rotary embedding of local layers, if it differs.
      rope_layers: whether each layer rotates queries and keys; empty: all do.
      experts: experts of the layers that have them; None: no layer has experts.
      expert_layers: whether each layer has experts; empty: all have.
      attention_scale: factor of the scores; None: `head_dim ** -0.5`.
      score_cap, logit_cap: limits of scores and of logits, which become `cap * tanh(x / cap)`; None: no limit.
      embedding_multiplier, residual_multiplier: factors of the embeddings, and of what a layer adds to the residual.
      logits_scaling: divisor of the logits.
      eos_token_ids: empty if the checkpoint names none.
      weights: format of the layers' kernels, but the routers' (`models.quantised`); None: the model's dtype.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms: Norms = "before"
    qk_norm: QkNorm | None = None
    activation: Activation = "silu"
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()
    attention_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    weights: WeightFormat | None = None

    @property
    def q_width(self) -> int:
        """Columns of the query projection: `num_heads * head_dim`."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key (or value) projection, `num_kv_heads * head_dim`: the `W` of a pool tile."""
        return self.num_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings of the layers, indexed by `LayerKind.rope`."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def kind(self, layer: int) -> LayerKind:
        """Returns the kind of a layer."""
        is_local = not self.window_layers or self.window_layers[layer]
        rope = int(is_local and self.local_rope is not None)
        return LayerKind(
            window=self.sliding_window if is_local else None,
            rope=rope if not self.rope_layers or self.rope_layers[layer] else None,
            has_experts=self.experts is not None and (not self.expert_layers or self.expert_layers[layer]),
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(map(self.kind, range(self.num_layers)))

    def up_to(self, max_model_len: int | None) -> ModelConfig:
        """Returns the config for sequences up to `max_model_len` tokens. It differs for "longrope", whose frequencies
        depend on the length of the longest sequence; a larger `max_model_len` changes nothing."""
        if (
            self.rope.kind != "longrope"
            or (max_model_len or self.max_position_embeddings) > self.max_position_embeddings
        ):
            return self
        return dataclasses.replace(self, max_position_embeddings=max_model_len or self.max_position_embeddings)

    @classmethod
    def from_dict(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a `config.json` written by transformers 4 or 5. Warns of unknown fields.

        Raises `UnsupportedModelError` naming the field, its value and the supported values.
        """
        return cls(**family_of(hf_config).read(hf_config))

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json`; end-of-sequence ids in `generation_config.json`, if present, take precedence. For a GGUF
        file, or a directory with one instead of `config.json`, reads the file's metadata.

        Raises `CheckpointError` for a missing or unreadable file, `UnsupportedModelError` like `from_dict`.
        """
        if file := gguf_file(path):
            return cls._from_gguf(file)
        path = Path(path)
        config = cls.from_dict(read_json(path / "config.json"))
        if (path / "generation_config.json").exists():
            eos_token_ids = token_ids(read_json(path / "generation_config.json").get("eos_token_id"))
            config = dataclasses.replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)
        return config

    @classmethod
    def _from_gguf(cls, file: Path) -> ModelConfig:
        header = read_header(file)
        fields, divisors = hf_config(header), rope_factors(header)
        try:
            config = cls.from_dict(fields)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: its metadata as {error}") from None
        if len(divisors) not in (0, config.head_dim // 2):
            pairs = config.head_dim // 2
            raise CheckpointError(f"{file}: tensor {ROPE_FACTORS}: expected {pairs} factors, found {len(divisors)}")
        return dataclasses.replace(config, rope=dataclasses.replace(config.rope, divisors=divisors))


_QUANTISATION = re.compile(r"[.-](i?q\d\w*|b?f16|f32)$")


def model_names(path: str | Path) -> frozenset[str]:
    """Lower-case names of the model in a directory or GGUF file: the name of the directory (in Hugging Face's cache, of
    the repository), and the last part of `_name_or_path` in `config.json`."""
    if file := gguf_file(path):
        return frozenset({_QUANTISATION.sub("", file.stem.lower())})
    path = Path(path).resolve()
    name = path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
    other = read_json(path / "config.json").get("_name_or_path")
    names = {name, *([] if not isinstance(other, str) else [other.rstrip("/").rpartition("/")[2]])}
    return frozenset(name.lower() for name in names if name)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `CheckpointError` if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
