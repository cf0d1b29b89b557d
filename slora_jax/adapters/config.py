"""adapter_config.json as PEFT writes it: every field is honoured, provably harmless, or refused by name.

The fields are those of PEFT 0.21.2's `LoraConfig`. An unknown field is refused unless it is inactive (null, false, zero
or empty): if active fields were ignored, an adapter could run with a wrong scale and no error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slora_jax.adapters.untrusted.patterns import check_pattern
from slora_jax.adapters.untrusted.plain_file import open_plain
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.errors import AdapterError

MAX_RANK = 256
"""Largest rank of one projection that the kernels accept."""

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""The stacked parameters of a layer's experts that can have LoRA (`target_parameters`)."""

TRAINED_MODULES = ("embed_tokens", "lm_head")
"""Modules outside the layers that adapters may have trained."""

MAX_BYTES = 1 << 20
"""Largest adapter_config.json, in bytes. PEFT writes about 1 kB, or 100 kB with a rank for each module of the largest
models."""

MAX_ITEMS = 4096
"""Most entries of a list or object in it: more than any model has modules."""

HARMLESS = frozenset(
    {
        # Provenance and training-time settings: no effect on a loaded adapter's output.
        "auto_mapping",
        "inference_mode",
        "lora_dropout",
        "merge_weights",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
        # Parameters of a method that another, checked field switches on.
        "megatron_core",
        "qalora_group_size",
        # Parameters of an initialisation. PEFT ignores them unless `init_lora_weights` names it (checked), and leaves
        # them in place when it saves a PiSSA/CorDA/LoRA-GA adapter converted to plain LoRA.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
    }
)
"""Fields that do not affect a loaded adapter's output."""

REFUSED = {
    "arrow_config": "Arrow routes every token among several adapters",
    "enable_lora": "the merged linear layers of early PEFT versions are not supported",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it changes the number of layers of the base model",
    "megatron_config": "Megatron's parallel linear layers are not supported",
    "monteclora_config": "MonteCLoRA perturbs the weights at random in each forward pass",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers",
    "velora_config": "VeLoRA's extra state is not supported",
}
"""Fields that must be inactive (null, false, zero or empty), and why."""

SWITCHED_ON_EMPTY = frozenset({"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"})
"""Refused fields for which PEFT reads an empty object as "on, with the defaults"."""

INACTIVE: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values that leave any field, known or unknown, without effect."""

PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Named initialisations that leave the base weights untouched, so the saved A and B are plain LoRA."""


@dataclass(frozen=True)
class LoraConfig:
    """The honoured fields, with PEFT's names, defaults and meaning.

    Attributes:
      target_modules: module-name suffixes, one regular expression that must match the whole name, or "all-linear";
        None: PEFT's default for this family of models.
      exclude_modules: suffixes or a regular expression, likewise.
      target_parameters: suffixes of parameters of experts.
      fan_in_fan_out: layout of the base weight; without effect, since PEFT sets it to False for linear layers.
      use_dora: the file has a magnitude for each output column of every target.
      lora_bias: the file has a bias beside every B.
      bias: "none"; "all" or "lora_only": the file has trained biases of the base model.
      modules_to_save: of embed_tokens and lm_head, those that the file has as whole matrices.
      trainable_token_indices: tokens whose embedding is trained; a mapping from module to tokens, or those of
        embed_tokens.
      alora_invocation_tokens: the adapter acts from the last occurrence of these tokens in the prompt on.
      ensure_weight_tying: only without effect: nothing outside the layers is trained.
      base_model_name_or_path: the base model that the adapter was trained on; only compared.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    fan_in_fan_out: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: tuple[int, ...] | None = None
    base_model_name_or_path: str | None = None
    target_parameters: tuple[str, ...] | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """The fields that make it more than plain LoRA."""
        active = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "bias": self.bias != "none",
            "modules_to_save": bool(self.modules_to_save),
            "trainable_token_indices": bool(self.tokens),
            "alora_invocation_tokens": bool(self.alora_invocation_tokens),
            "target_parameters": bool(self.target_parameters),
        }
        return tuple(name for name, is_active in active.items() if is_active)

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Trained tokens by module."""
        tokens = self.trainable_token_indices or {}
        return {"embed_tokens": tokens} if isinstance(tokens, tuple) else dict(tokens)

    @classmethod
    def from_json(cls, data: object) -> LoraConfig:
        """Checks every field of a parsed adapter_config.json. Raises AdapterError naming field, value and reason."""
        if not isinstance(data, dict):
            raise AdapterError(f"expected a JSON object, found {type(data).__name__}")
        if data.get("peft_type") != "LORA":
            raise AdapterError(f"peft_type: expected 'LORA', found {quoted(data.get('peft_type'))}")
        _refuse_unsupported(data)
        honoured: dict[str, Any] = {name: read(name, data[name]) for name, read in _READERS.items() if name in data}
        config = cls(**honoured)
        config._check_combinations()
        return config

    @classmethod
    def from_file(cls, path: Path) -> LoraConfig:
        """Reads an adapter_config.json. Raises AdapterError naming the file when it is unreadable or not supported."""
        try:
            with open_plain(path) as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise AdapterError(f"{path}: no such file; expected a directory saved by PEFT") from None
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read: {error}") from error
        if len(content) > MAX_BYTES:
            raise AdapterError(f"{path}: is larger than {MAX_BYTES} bytes; PEFT writes about 1 kB")
        try:
            return cls.from_json(json.loads(content, object_pairs_hook=_without_duplicates))
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}: not valid JSON: {clipped(error)}") from None

    def to_json(self) -> dict[str, Any]:
        """The content of an adapter_config.json that PEFT reads back with the same meaning."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        fields |= {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        plain = {"inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0}
        return fields | plain | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}

    def _check_combinations(self) -> None:
        """Raises AdapterError for the contradictions that PEFT refuses, and for a regular expression (in the form in
        which it will be matched) that `check_pattern` refuses."""
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) not in (None, (), ""):
                    raise AdapterError(f"{name}: cannot be combined with target_modules {quoted(self.target_modules)}")
        others = [name for name in self.extras if name != "alora_invocation_tokens"]
        if self.alora_invocation_tokens and others:
            raise AdapterError(
                f"alora_invocation_tokens: cannot be combined with {', '.join(others)}; must be unset, found "
                f"{quoted(self.alora_invocation_tokens)}"
            )
        if self.ensure_weight_tying and (self.modules_to_save or self.tokens):
            raise AdapterError(
                "ensure_weight_tying: ties trained modules to others, which is not supported together with "
                "modules_to_save or trainable_token_indices; must be unset, found True"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern: needs layers_to_transform")
        patterns = [(name, getattr(self, name)) for name in ("target_modules", "exclude_modules")]
        patterns = [(name, value) for name, value in patterns if isinstance(value, str)]
        layers = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        patterns += [("layers_pattern", layer_regex(value)) for value in layers]
        patterns += [("rank_pattern", pattern_regex(value)) for value in self.rank_pattern]
        patterns += [("alpha_pattern", pattern_regex(value)) for value in self.alpha_pattern]
        for name, pattern in patterns:
            check_pattern(name, pattern)


def pattern_regex(key: str) -> str:
    """A rank_pattern or alpha_pattern key as PEFT matches it: at the end of a module name, after a dot."""
    return rf"(.*\.)?({key})$"


def layer_regex(pattern: str) -> str:
    """A layers_pattern as PEFT matches it: the first number that follows it is the layer index."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _refuse_unsupported(data: dict[str, Any]) -> None:
    for name, value in data.items():
        if name in _READERS or name in HARMLESS or name == "peft_type":
            continue
        if name == "init_lora_weights":
            _refuse_changed_base(value)
        elif name in REFUSED:
            if value not in INACTIVE or (value == {} and name in SWITCHED_ON_EMPTY):
                raise AdapterError(f"{name}: {REFUSED[name]}; must be unset, found {quoted(value)}")
        elif value not in INACTIVE:
            raise AdapterError(
                f"{clipped(name)}: unknown field with value {quoted(value)}; "
                "remove it if it does not change the computation"
            )


def _refuse_changed_base(value: object) -> None:
    """Refuses initialisations that change the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA): A and B are relative
    to the changed base. PEFT's `path_initial_model_for_weight_conversion` saves them as plain LoRA, marked True."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in PLAIN_INITS):
        return
    raise AdapterError(
        f"init_lora_weights: {quoted(value)} changes the base weights or is unknown; save the adapter with "
        "path_initial_model_for_weight_conversion to turn it into plain LoRA"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise AdapterError(f"field {quoted(next(n for n in counts if counts[n] > 1))} occurs twice")
    return result


def _check_count(name: str, value: object) -> None:
    if isinstance(value, (list, dict)) and len(value) > MAX_ITEMS:
        raise AdapterError(f"{name}: must have at most {MAX_ITEMS} entries, found {len(value)}")


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{name}: rank must be an integer in 1..{MAX_RANK}, found {quoted(value)}")
    return value


def _alpha(name: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)) and -1e30 < value < 1e30:
        return value  # NaN fails both comparisons
    raise AdapterError(f"{name}: must be a finite number, found {quoted(value)}")


def _flag(name: str, value: Any) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise AdapterError(f"{name}: must be true or false, found {quoted(value)}")
    return value


def _bias(name: str, value: Any) -> str:
    if value in INACTIVE:
        return "none"
    if value not in ("none", "all", "lora_only"):
        raise AdapterError(f"{name}: must be 'none', 'all' or 'lora_only', found {quoted(value)}")
    return str(value)


def _saved(name: str, value: Any) -> tuple[str, ...] | None:
    if value in INACTIVE:
        return None
    names = _names(name, value)
    names = (names,) if isinstance(names, str) else names or ()
    modules = tuple(dict.fromkeys(one.split(".")[-1] for one in names))
    if unknown := [one for one in modules if one not in TRAINED_MODULES]:
        raise AdapterError(
            f"{name}: fully trained modules other than {' and '.join(TRAINED_MODULES)} are not supported, found "
            f"{quoted(unknown)}"
        )
    return modules


def _parameters(name: str, value: Any) -> tuple[str, ...] | None:
    if value in INACTIVE:
        return None
    names = _names(name, value)
    parameters = (names,) if isinstance(names, str) else names or ()
    for one in parameters:
        *modules, parameter = one.split(".")
        if parameter not in EXPERT_PARAMETERS or modules[-1:] not in ([], ["experts"]):
            what = (
                "LoRA on the router is not supported" if modules[-1:] == ["gate"] else "it is no parameter of experts"
            )
            raise AdapterError(
                f"{name}: {quoted(one)}: {what}; expected mlp.experts.{' or mlp.experts.'.join(EXPERT_PARAMETERS)}"
            )
    return parameters


def _tokens(name: str, value: Any) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
    _check_count(name, value)
    if value in INACTIVE:
        return None
    if isinstance(value, dict):
        modules = {str(module).split(".")[-1]: tokens for module, tokens in value.items()}
        if unknown := modules.keys() - set(TRAINED_MODULES):
            raise AdapterError(f"{name}: expected tokens of {' or '.join(TRAINED_MODULES)}, found {quoted(unknown)}")
        return {module: _token_list(name, tokens) for module, tokens in modules.items()}
    return _token_list(name, value)


def _invocation(name: str, value: Any) -> tuple[int, ...] | None:
    _check_count(name, value)
    if value in INACTIVE:
        return None
    if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        raise AdapterError(f"{name}: must be a list of token ids, found {quoted(value)}")
    return tuple(value)


def _token_list(name: str, value: Any) -> tuple[int, ...]:
    tokens = _invocation(name, value) or ()
    if not 1 <= len(tokens) <= MAX_RANK or len(set(tokens)) < len(tokens):
        raise AdapterError(f"{name}: must be a list of 1 to {MAX_RANK} different token ids, found {quoted(value)}")
    return tokens


def _text(name: str, value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _names(name: str, value: Any) -> tuple[str, ...] | str | None:
    _check_count(name, value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterError(f"{name}: must be a string or a list of strings, found {quoted(value)}")


def _layers(name: str, value: Any) -> tuple[int, ...] | int | None:
    _check_count(name, value)
    items = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return tuple(value) if isinstance(value, list) else value
    raise AdapterError(f"{name}: must be an integer or a list of integers, found {quoted(value)}")


def _patterns(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise AdapterError(f"{name}: must be an object of module patterns, found {quoted(value)}")
    _check_count(name, value)
    read = _rank if name == "rank_pattern" else _alpha
    return {key: read(f"{name}[{quoted(key)}]", item) for key, item in (value or {}).items()}


_READERS = {
    "r": _rank,
    "lora_alpha": _alpha,
    "target_modules": _names,
    "exclude_modules": _names,
    "rank_pattern": _patterns,
    "alpha_pattern": _patterns,
    "use_rslora": _flag,
    "layers_to_transform": _layers,
    "layers_pattern": _names,
    "fan_in_fan_out": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "bias": _bias,
    "modules_to_save": _saved,
    "trainable_token_indices": _tokens,
    "ensure_weight_tying": _flag,
    "alora_invocation_tokens": _invocation,
    "base_model_name_or_path": _text,
    "target_parameters": _parameters,
}
