"""The config file of `slora train`: which adapters to train, on what, and how."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from slora_jax.adapters.config import LoraConfig
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.typed import Count, Natural, Positive, Range, check_fields, made, refuse_unknown, typed

_UNTRAINED = {"use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
_UNTRAINED |= {"alora_invocation_tokens", "target_parameters"}

LORA_FIELDS = tuple(
    field.name for field in fields(LoraConfig) if field.name != "fan_in_fan_out" and field.name not in _UNTRAINED
)
"""Fields of `lora`. PEFT's other fields would change the training and are not implemented."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
"""An adapter's name, which is its directory's name too."""

NonNegative = Annotated[float, Range(least=0)]
Beta = Annotated[float, Range(least=0, most=0.999999)]


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained.

    Attributes:
      data: JSONL file of examples.
      lora: the adapter, in PEFT's fields.
      test: JSONL file of evaluation examples.
      evaluation: share of `data` that is held out for evaluation instead; the seed chooses it.
      epochs: passes over the examples. steps: optimizer steps. One of the two is given.
      batch_size: sequences of an optimizer step.
      learning_rate: peak of the schedule.
      schedule: of the learning rate after the warmup: constant, or down to 0 at the last step.
      warmup: steps during which the learning rate rises linearly from 0.
      weight_decay: decoupled, as in AdamW.
      clip_norm: largest global norm of the adapter's gradient; 0: no limit.
      seed: determines the initial weights, the order of the examples, and the held-out share.
      early_stopping: evaluations without improvement after which training stops. The weights of the best evaluation
        are written. None: train to the end and write the last weights.
    """

    data: Path
    lora: LoraConfig = field(default_factory=LoraConfig)
    test: Path | None = None
    evaluation: Annotated[float, Range(least=0, most=0.9)] = 0.0
    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count = 8
    learning_rate: Positive = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Natural = 0
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-12
    seed: Natural = 0
    early_stopping: Count | None = None

    @property
    def has_evaluation(self) -> bool:
        """Returns whether the adapter has evaluation examples."""
        return self.test is not None or self.evaluation > 0

    def check(self, where: str) -> None:
        """Raises ConfigError if fields contradict each other; `where` prefixes the fields' names."""
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else f"epochs={self.epochs}, steps={self.steps}"
            raise ConfigError(f"{where}epochs: give either epochs or steps, found {found}")
        if self.test is not None and self.evaluation:
            raise ConfigError(f"{where}evaluation={self.evaluation}: cannot be combined with test; give one of the two")
        if self.early_stopping is not None and not self.has_evaluation:
            raise ConfigError(
                f"{where}early_stopping={self.early_stopping}: needs evaluation examples; give test or evaluation"
            )


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Attributes:
      output: directory of the adapters, checkpoints, log and curves.
      adapters: by name.
      max_length: tokens of the longest example, prompt and completion; None: 1024, or the model's longest sequence if
        that is shorter.
      too_long: whether a longer example is skipped, or cut to its first `max_length` tokens.
      evaluate_every: steps between evaluations; None: only after an adapter's last step.
      checkpoint_every: steps between checkpoints.
      micro_step_tokens: most tokens of one pass through the model, padding included; more tokens take more memory.
      dtype: of the activations and the base model's weights.
    """

    output: Path
    adapters: Mapping[str, AdapterRecipe]
    max_length: Annotated[int, Range(least=2)] | None = None
    too_long: Literal["skip", "cut"] = "skip"
    evaluate_every: Count | None = None
    checkpoint_every: Count = 100
    micro_step_tokens: Count = 2048
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "")

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Reads a YAML file. Paths in it are relative to its directory.

        Raises:
          ConfigError: the file cannot be read, a field is unknown, missing or out of range, or fields contradict each
            other; the message names file and field.
        """
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        try:
            return cls.from_mapping(data, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_mapping(cls, data: Any, directory: Path = Path()) -> Recipe:
        """Reads the content of such a file; paths are relative to `directory`. Raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"must be a mapping of settings, found {type(data).__name__}")
        refuse_unknown(data, (*(one.name for one in fields(cls)), "defaults"), "")
        for name, meaning in (("output", "a directory"), ("adapters", "a mapping of names to settings")):
            if name not in data:
                raise ConfigError(f"{name} is missing: give {meaning}")
        adapters = data["adapters"]
        if not isinstance(adapters, Mapping) or not adapters:
            raise ConfigError(f"adapters={adapters!r}: must be a mapping of names to settings, with at least one")
        defaults = _mapping(data.get("defaults", {}), "defaults")
        _adapter({"data": "", **defaults}, "defaults", directory)  # names a wrong field as the defaults'
        settings = {name: value for name, value in data.items() if name not in ("defaults", "adapters")}
        read = {name: _named(name, value, defaults, directory) for name, value in adapters.items()}
        settings["output"] = directory / typed(settings["output"], Path, "output")
        return made(cls, settings | {"adapters": read}, "")

    def conditions(self) -> dict[str, Any]:
        """Returns every setting that the trained weights depend on, as JSON, for comparison with a checkpoint's.

        Paths are left out; the content of the data is compared instead.
        """
        found = {name: getattr(self, name) for name in ("max_length", "too_long", "evaluate_every")}
        found |= {"micro_step_tokens": self.micro_step_tokens, "dtype": self.dtype, "adapters": {}}
        for name, adapter in self.adapters.items():
            settings = asdict(adapter) | {"lora": adapter.lora.to_json()}
            found["adapters"][name] = {key: value for key, value in settings.items() if key not in ("data", "test")}
        return found


def _named(name: Any, value: Any, defaults: Mapping[str, Any], directory: Path) -> AdapterRecipe:
    """Reads one entry of `adapters`, completed by the defaults."""
    where = f"adapters.{name}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: an adapter's name must begin with a letter or digit and contain only letters, digits, '_', '-' "
            "and '.', at most 128 in all"
        )
    own = _mapping(value, where)
    rivals = ({"epochs", "steps"}, {"test", "evaluation"})
    hidden = {other for pair in rivals if pair & own.keys() for other in pair}
    merged = {key: default for key, default in defaults.items() if key not in hidden} | own
    if isinstance(own.get("lora"), Mapping) and "lora" in defaults:
        merged["lora"] = {**defaults["lora"], **own["lora"]}
    if "data" not in merged:
        raise ConfigError(f"{where}.data is missing: give a JSONL file")
    adapter = _adapter(merged, where, directory)
    adapter.check(f"{where}.")
    return adapter


def _adapter(settings: Mapping[str, Any], where: str, directory: Path) -> AdapterRecipe:
    values = dict(settings)
    if "lora" in values:
        values["lora"] = _lora(values["lora"], f"{where}.lora")
    for name in ("data", "test"):
        if values.get(name) is not None:
            values[name] = directory / typed(values[name], Path, f"{where}.{name}")
    return made(AdapterRecipe, values, where)


def _lora(value: Any, where: str) -> LoraConfig:
    data = _mapping(value, where)
    refuse_unknown(data, LORA_FIELDS, f"{where}.")
    try:
        return LoraConfig.from_json({**data, "peft_type": "LORA"})
    except AdapterError as error:
        raise ConfigError(f"{where}.{error}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={value!r}: must be a mapping")
    return dict(value)


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as YAML 1.2 does, and rejects a key that occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
