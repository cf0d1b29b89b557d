"""Model configuration: a Hugging Face `config.json` or the metadata of a GGUF file.

A field that would change the computation is honoured or rejected by name (`config_fields`). Other fields are ignored;
one warning names the unknown ones.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models.config_fields import CHANGES_LOGITS, HARMLESS_FIELDS, INACTIVE, NEUTRAL_VALUES, READ_FIELDS
from slora_jax.models.gguf.config import ROPE_FACTORS, hf_config, rope_factors
from slora_jax.models.gguf.header import gguf_file, read_header

RopeKind = Literal["default", "linear", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and the scaling applied to it.

    Attributes:
      factor: for "linear" and "llama3".
      low_freq_factor, high_freq_factor: for "llama3", in the notation of the Llama 3.1 release.
      original_max_position_embeddings: for "llama3", in tokens.
      divisors: further divisors of the frequencies, one per rotated pair (GGUF's form of Llama 3's scaling), or empty.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    divisors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and sizes of a checkpoint. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      max_position_embeddings: the longest sequence, in tokens.
      qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
      qk_norm: whether q and k have Qwen3's per-head norm.
      sliding_window: keys that a query attends to in every layer, including its own; None: no limit.
      eos_token_ids: empty if the checkpoint names none.
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
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_width(self) -> int:
        """Columns of the query projection: `num_heads * head_dim`."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key (or value) projection, `num_kv_heads * head_dim`: the `W` of a pool tile."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_dict(cls, hf_config: Mapping[str, Any]) -> "ModelConfig":
        """Reads the content of a `config.json` written by transformers 4 or 5. Warns of unknown fields.

        Raises `UnsupportedModelError` naming the field, its value and the supported values.
        """
        name = hf_config.get("model_type")
        if not isinstance(name, str) or name not in _FAMILIES:
            raise _refused("model_type", name, f"one of {sorted(_FAMILIES)}")
        family = _FAMILIES[name]
        _check_fields(hf_config, family)
        max_positions = _positive_int(hf_config, "max_position_embeddings", family.max_position_embeddings)

        hidden_size = _positive_int(hf_config, "hidden_size")
        num_layers = _positive_int(hf_config, "num_hidden_layers")
        num_heads = _positive_int(hf_config, "num_attention_heads")
        num_kv_heads = num_heads
        if hf_config.get("num_key_value_heads", family.num_kv_heads) is not None:
            num_kv_heads = _positive_int(hf_config, "num_key_value_heads", family.num_kv_heads)
        if num_heads % num_kv_heads:
            raise _refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
        if hf_config.get("head_dim", family.head_dim) is not None:
            head_dim = _positive_int(hf_config, "head_dim", family.head_dim)
        elif hidden_size % num_heads:
            raise _refused("hidden_size", hidden_size, f"a multiple of num_attention_heads={num_heads}")
        else:
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise _refused("head_dim", head_dim, "an even number (rotary embedding rotates pairs)")
        layer_types = hf_config.get("layer_types")
        if layer_types is not None and list(layer_types) != ["full_attention"] * num_layers:
            raise _refused("layer_types", layer_types, f'"full_attention" for each of the {num_layers} layers')

        attention_bias = _boolean(hf_config, "attention_bias")
        return cls(
            family=name,
            vocab_size=_positive_int(hf_config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(hf_config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=_rope(hf_config, max_positions),
            rms_norm_eps=_positive_number(hf_config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_boolean(hf_config, "tie_word_embeddings"),
            max_position_embeddings=max_positions,
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=_boolean(hf_config, "mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(hf_config, family, max_positions),
            eos_token_ids=_token_ids(hf_config.get("eos_token_id")),
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Reads `config.json`; end-of-sequence ids in `generation_config.json`, if present, take precedence. For a GGUF
        file, or a directory with one instead of `config.json`, reads the file's metadata.

        Raises `CheckpointError` for a missing or unreadable file, `UnsupportedModelError` like `from_dict`.
        """
        if file := gguf_file(path):
            return cls._from_gguf(file)
        path = Path(path)
        config = cls.from_dict(read_json(path / "config.json"))
        if (path / "generation_config.json").exists():
            eos_token_ids = _token_ids(read_json(path / "generation_config.json").get("eos_token_id"))
            config = dataclasses.replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)
        return config

    @classmethod
    def _from_gguf(cls, file: Path) -> "ModelConfig":
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


@dataclasses.dataclass(frozen=True)
class _Family:
    """An architecture's fixed properties, and transformers' defaults for fields missing from a config.json."""

    architecture: str
    max_position_embeddings: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    sliding_window: int | None = None
    window_switch: bool = False  # the window counts only if use_sliding_window is set
    qkv_bias: bool = False
    qk_norm: bool = False
    bias_fields: frozenset[str] = frozenset()  # honoured switches
    implied_switches: frozenset[str] = frozenset()  # switches that may be true, since the feature is always on


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048, bias_fields=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Family("MistralForCausalLM", 131072, num_kv_heads=8, sliding_window=4096),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        32768,
        num_kv_heads=32,
        sliding_window=4096,
        window_switch=True,
        qkv_bias=True,
        implied_switches=frozenset({"attention_qkv_bias", "qkv_bias", "use_qkv_bias"}),
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        window_switch=True,
        qk_norm=True,
        bias_fields=frozenset({"attention_bias"}),
        implied_switches=frozenset({"qk_layernorm", "qk_norm", "use_qk_norm"}),
    ),
}


def _refused(field: str, value: Any, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {field}={value!r} is not supported; supported: {supported}")


def _check_fields(hf_config: Mapping[str, Any], family: _Family) -> None:
    """Rejects other architectures and fields that would change the computation; warns of other unknown fields."""
    architectures = hf_config.get("architectures")
    if architectures is not None and list(architectures) != [family.architecture]:
        raise _refused("architectures", architectures, f"[{family.architecture!r}]")
    unknown = []
    for field, value in hf_config.items():
        if field in ("architectures", *READ_FIELDS, *HARMLESS_FIELDS) and field not in NEUTRAL_VALUES:
            continue
        if field in family.bias_fields or (value is True and field in family.implied_switches):
            continue
        if field in NEUTRAL_VALUES or CHANGES_LOGITS.search(field):
            neutral = NEUTRAL_VALUES.get(field, INACTIVE)
            if value not in neutral:
                allowed = "null, false, 0 or empty" if neutral is INACTIVE else " or ".join(map(_json, neutral))
                raise _refused(field, value, allowed)
        elif value not in INACTIVE:
            unknown.append(field)
    if unknown:
        warnings.warn(
            f"config.json: {', '.join(unknown)}: not known, and ignored; if the model needs one of these fields, its "
            "outputs are wrong",
            stacklevel=3,
        )


def _json(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _sliding_window(hf_config: Mapping[str, Any], family: _Family, max_positions: int) -> int | None:
    """The window of every layer; None if there is none, it is off, or it is at least as long as the longest sequence.
    Rejects Qwen's windows, which only some layers have."""
    if family.window_switch and not _boolean(hf_config, "use_sliding_window"):
        return None
    if hf_config.get("use_sliding_window") and not family.window_switch:
        raise _refused("use_sliding_window", True, "false")
    if hf_config.get("sliding_window", family.sliding_window) is None:
        return None
    window = _positive_int(hf_config, "sliding_window", family.sliding_window)
    if window >= max_positions:
        return None
    if family.window_switch:
        field = "use_sliding_window=True with sliding_window"
        raise _refused(field, window, f"full attention: null, or at least max_position_embeddings={max_positions}")
    return window


_ROPE_PARAMETERS: dict[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def _rope(hf_config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    fields = _merged_rope_fields(hf_config)
    name = fields.pop("rope_type", None) or "default"
    if name not in _ROPE_PARAMETERS:
        raise _refused("rope_type", name, f"one of {sorted(_ROPE_PARAMETERS)}")
    kind: RopeKind = name
    theta = _positive_number(fields, "rope_theta", 10000.0)
    fields.pop("rope_theta", None)
    partial = fields.pop("partial_rotary_factor", 1.0)
    if partial not in NEUTRAL_VALUES["partial_rotary_factor"]:
        raise _refused("partial_rotary_factor", partial, "1.0")
    original = _positive_int(fields, "original_max_position_embeddings", max_positions)
    if kind == "llama3":
        fields["original_max_position_embeddings"] = original
    else:
        fields.pop("original_max_position_embeddings", None)
    if fields.keys() != _ROPE_PARAMETERS[kind]:
        raise _refused(
            f"rope_parameters of rope_type {kind!r}", sorted(fields), f"exactly {sorted(_ROPE_PARAMETERS[kind])}"
        )
    factor = _positive_number(fields, "factor", 1.0)
    low, high = _positive_number(fields, "low_freq_factor", 1.0), _positive_number(fields, "high_freq_factor", 1.0)
    if kind != "llama3":
        return RopeConfig(theta, kind, factor)
    if high <= low:
        raise _refused("high_freq_factor", high, f"above low_freq_factor={low}")
    return RopeConfig(theta, kind, factor, low, high, original)


def _merged_rope_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope fields from all places in the file, under their transformers 5 names. Rejects contradictions."""
    merged: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling", "rope_theta"):
        fields = hf_config.get(source)
        if source == "rope_theta":
            fields = {} if fields is None else {"rope_theta": fields}
        if not isinstance(fields, Mapping | None):
            raise _refused(source, fields, "a dictionary or null")
        for name, value in (fields or {}).items():
            name = "rope_type" if name == "type" else name
            if value is not None and merged.setdefault(name, value) != value:
                raise _refused(f"{source}: {name}", value, f"the value given elsewhere in the file, {merged[name]!r}")
    return merged


def _positive_int(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(name, value, "a positive integer")
    return value


def _positive_number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise _refused(name, value, "a positive number")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _refused(name, value, "true or false")
    return bool(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise _refused("eos_token_id", value, "an integer, a list of integers, or null")
    return ids


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
