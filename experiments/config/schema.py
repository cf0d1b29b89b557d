"""The settings of a run: plain values in sections."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from experiments.workloads import WORKLOADS, find_generator
from slora_jax import ConfigError
from slora_jax.adapters import LoraConfig
from slora_jax.adapters.targets import resolve_targets
from slora_jax.models.config import ModelConfig, read_json
from slora_jax.scheduling import make_policy
from slora_jax.simulation import SYSTEMS, SystemConfig, devices
from slora_jax.typed import Count, Seconds, Share, nearest, refuse_unknown, typed

MODELS = Path(__file__).parents[1] / "models"

Mode = Literal["simulated", "real", "served", "load_test", "replicas"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class AdaptersConfig:
    """The registered adapters. A file may give the path alone: `adapters: DIR`.

    Attributes:
      count: number of adapters; 0: all requests use the base model.
      ranks: the adapters take them in turn.
      targets: projections that each adapter changes.
      path: directory of PEFT directories, in order of their names, which decide ranks and targets (count takes the
        first ones only); None: random adapters.
    """

    count: int = 1
    ranks: tuple[int, ...] = (8,)
    targets: tuple[Target, ...] = ("q", "k", "v", "o")
    path: Path | None = None

    @property
    def directories(self) -> list[Path]:
        """Returns the directories of real adapters, as many as are registered."""
        assert self.path is not None
        return adapter_directories(self.path)[: self.count]


def adapter_directories(path: Path) -> list[Path]:
    """Returns the PEFT directories in a directory, or that directory itself."""
    found = sorted(file.parent for file in path.glob("*/adapter_config.json"))
    return found or [file.parent for file in path.glob("adapter_config.json")]


@dataclass(frozen=True)
class WorkloadConfig:
    """The requests.

    Attributes:
      kind: a name of `WORKLOADS`, or another generator as "module:function".
      rate: requests per second.
      duration: of the arrivals, in seconds.
      parameters: the generator's other arguments, by name; a file has them beside the fields above.
    """

    kind: str = "synthetic"
    rate: float = 1.0
    duration: float = 60.0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientConfig:
    """The clients. kind: "open" sends each request at its time; "closed" has `users` clients, each of which sends its
    next request `think_seconds` after its last answer."""

    kind: Literal["open", "closed"] = "open"
    users: int = 1
    think_seconds: float = 0.0


@dataclass(frozen=True)
class SystemSection:
    """The system that serves.

    Attributes:
      name: of `slora_jax.simulation.SYSTEMS`; the real runner has the same, and "peft-mixed".
      policy: a name, or a mapping with the name and its settings; None: the system's own.
      settings: fields of `SystemConfig`, by name; a file has them beside the fields above.
    """

    name: str = "slora"
    policy: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSection:
    """Settings of a real engine; the simulator ignores them.

    Attributes:
      dtype, kernels, decode_buckets, mixed_buckets: as in `EngineConfig`.
      max_model_len: tokens; None: the longest request of the workload, rounded up to a multiple of 128.
      batch: requests in a batch of PEFT, at most.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: str = "auto"
    max_model_len: int | None = None
    decode_buckets: tuple[int, ...] | None = None
    mixed_buckets: tuple[int, ...] | None = None
    batch: int = 8


@dataclass(frozen=True)
class ServerSection:
    """A running server. url: `http://HOST:PORT`. key_env: environment variable with the API key; None: no key is sent.
    timeout_seconds: longest silence of the server."""

    url: str = "http://127.0.0.1:8000"
    key_env: str | None = None
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class MeasuredSection:
    """Measurement of a run beside the other runs of its panel (`experiments.rounds`).

    Attributes:
      rounds: timed repetitions.
      load: the request rate, as a share of the panel's lowest throughput when all requests are present at the start;
        None: the workload's rate.
      disk_seconds: added to each read of an adapter from disk.
      groups: name -> [first, last + 1] adapter numbers, whose requests are also measured on their own.
    """

    rounds: Count = 3
    load: Share | None = None
    disk_seconds: Seconds = 0.0
    groups: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadTestSection:
    """Mode "load_test": the requests sent to `slora serve` by locust (`client.users` users), or to the engine alone.

    Attributes:
      side: "alone", "served", or "soak": served for `soak_seconds`, while the server's memory, file handles, threads
        and pool pages are watched.
      warm_up: requests before the timed ones.
      soak_seconds: 0 leaves the soak out of the experiment.
      temperature, top_p: of every other request, which has a seed of its own; the others are greedy.
      directory: keeps model and adapters for the next run; None: a temporary one.
    """

    side: Literal["alone", "served", "soak"] = "served"
    warm_up: Count = 64
    soak_seconds: Seconds = 240.0
    temperature: Seconds = 0.8
    top_p: Share = 0.95
    directory: Path | None = None


@dataclass(frozen=True)
class ReplicasSection:
    """Mode "replicas": engines behind Ray Serve's router, and a closed loop of HTTP clients.

    Attributes:
      count: replicas.
      route: "adapter": the router knows the request's adapter and prefers the replica that holds it. "load": it takes
        the less busy replica. "round_robin": it takes turns.
      warm_up: requests before the measured ones.
      requests_per_replica: requests that a replica takes at once.
    """

    count: Count = 2
    route: Literal["adapter", "load", "round_robin"] = "adapter"
    warm_up: Count = 200
    requests_per_replica: Count = 12


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
      mode: "simulated"; "real": an engine of this process; "served": a running server, which has its own model,
        adapters and settings; "load_test", "replicas": servers started for the run.
      model: a file of `experiments/models` without its suffix, or the path of a config.json: the weights are random. Or
        a Hugging Face directory or GGUF file with weights.
      device: of the simulator, a name or the path of a file.
      seed: of workload and weights.
      slo_seconds: for the first token.
      dollars_per_hour: the device's price, for `dollars_per_million_tokens`; None: not computed.
      measured: None: the run is carried out once, from an empty pool.
    """

    mode: Mode = "simulated"
    model: str = "llama-7b"
    device: str = "a10g"
    seed: int = 42
    slo_seconds: float = 6.0
    dollars_per_hour: float | None = None
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    system: SystemSection = field(default_factory=SystemSection)
    engine: EngineSection = field(default_factory=EngineSection)
    server: ServerSection = field(default_factory=ServerSection)
    measured: MeasuredSection | None = None
    load_test: LoadTestSection | None = None
    replicas: ReplicasSection | None = None

    @property
    def model_file(self) -> Path:
        """Returns the model's config.json, directory or GGUF file."""
        named = MODELS / f"{self.model}.json"
        return named if named.is_file() else Path(self.model)

    @property
    def has_weights(self) -> bool:
        """True if the model comes with weights."""
        return self.model_file.suffix != ".json"

    def model_config(self) -> ModelConfig:
        """Returns the model's configuration. Raises CheckpointError, UnsupportedModelError as `ModelConfig`."""
        file = self.model_file
        return ModelConfig.from_directory(file) if self.has_weights else ModelConfig.from_dict(read_json(file))

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values without the fields that are None, so that a field that a run lacks changes no key."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.adapters.path is None:
            del given["adapters"]["path"]
        if self.mode != "served":
            del given["server"]
        return json.loads(json.dumps(given, default=str))  # type: ignore[no-any-return]

    @property
    def key(self) -> str:
        """The run's identity: a digest of all fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def value(self, path: str) -> Any:
        """Returns a field by its dotted name in a file: `workload.cv`, `system.num_tokens`."""
        at: Any = self
        for name in path.split("."):
            open_part = next((getattr(at, p) for p in ("parameters", "settings") if hasattr(at, p)), {})
            if isinstance(at, Mapping):
                at = at.get(name)
            elif hasattr(at, name):
                at = getattr(at, name)
            else:
                at = open_part.get(name)
        return at


SECTIONS: dict[str, type] = {
    "adapters": AdaptersConfig,
    "workload": WorkloadConfig,
    "client": ClientConfig,
    "system": SystemSection,
    "engine": EngineSection,
    "server": ServerSection,
    "measured": MeasuredSection,
    "load_test": LoadTestSection,
    "replicas": ReplicasSection,
}

_OPEN = {"workload": "parameters", "system": "settings"}
"""Sections that take other names beside their fields, and the field that holds these."""

_GIVEN = ("num_adapters", "ranks", "rate", "duration", "seed", "round_number")
"""Arguments of a generator that other fields decide."""


@cache
def known_fields(section: str) -> dict[str, Any]:
    """Returns the names that a section of a file may have ("": the run itself), with their types."""
    kind = SECTIONS.get(section, RunConfig)
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name: hints[f.name] for f in fields(kind) if f.name not in (_OPEN.get(section), *SECTIONS)}
    if section == "workload":
        for generator in WORKLOADS.values():
            known |= _parameters(generator)
    if section == "system":
        hints = get_type_hints(SystemConfig)
        known |= {f.name: hints[f.name] for f in fields(SystemConfig) if f.name not in ("name", "policy")}
    return known


def section_fields(section: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `known_fields`, and the arguments of generators that the section names as "module:function"."""
    known = dict(known_fields(section))
    if section == "workload":
        kinds = content.get("kind")
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if isinstance(kind, str) and ":" in kind:
                known |= _parameters(find_generator(kind))
    return known


def run_config(content: Mapping[str, Any]) -> RunConfig:
    """Makes a run from the content of a file without cases and sweeps.

    Raises:
      ConfigError: a name is unknown, or a value has a wrong type or is out of range.
    """
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in SECTIONS:
            values[name] = _section(name, value)
        else:
            refuse_unknown([name], [*known_fields(""), *SECTIONS], "")
            values[name] = typed(value, known_fields("")[name], name)
    run = RunConfig(**values)
    _check(run)
    if run.mode in ("load_test", "replicas"):
        _check_servers(run, content)
    if run.adapters.path is not None:
        given = set(content["adapters"]) if isinstance(content["adapters"], Mapping) else set()
        run = replace(run, adapters=_real_adapters(run, given))
    return run


def _real_adapters(run: RunConfig, given: set[str]) -> AdaptersConfig:
    """Reads the fields that the directories decide. given: fields that the file has.

    Raises:
      ConfigError: there are too few directories, or the file gives a field that they decide.
      AdapterError: an adapter cannot be used.
    """
    path, num_layers = run.adapters.path, run.model_config().num_layers
    assert path is not None
    directories = adapter_directories(path)
    if not directories:
        raise ConfigError(f"adapters.path={path}: has no PEFT directories (with an adapter_config.json)")
    if decided := given & {"ranks", "targets"}:
        raise ConfigError(f"adapters.{min(decided)}: the adapters in path={path} have their own; leave it out")
    count = run.adapters.count if "count" in given else len(directories)
    if count > len(directories):
        raise ConfigError(f"adapters.count={count}: path={path} has {len(directories)}; lower it")
    found = [resolve_targets(LoraConfig.from_file(d / "adapter_config.json"), num_layers) for d in directories[:count]]
    adapted = {projection for targets in found for _, projection in targets}
    return AdaptersConfig(
        count=count,
        ranks=tuple(max(target.rank for target in targets.values()) for targets in found) or (1,),
        targets=tuple(name for name in get_args(Target) if name in adapted) or AdaptersConfig.targets,
        path=path,
    )


def _section(section: str, content: Any) -> Any:
    if section == "adapters" and isinstance(content, str):
        content = {"path": content}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{section}={content!r}: must be a section with fields {', '.join(known_fields(section))}")
    known = section_fields(section, content)
    refuse_unknown(content, known, f"{section}.")
    own = {f.name for f in fields(SECTIONS[section])}
    values: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in content.items():
        if (section, name) == ("system", "policy"):
            values["policy"] = None if value is None else {"name": value} if isinstance(value, str) else dict(value)
            continue
        (values if name in own else others)[name] = typed(value, known[name], f"{section}.{name}")
    if section in _OPEN:
        values[_OPEN[section]] = others
    return SECTIONS[section](**values)


def _check(run: RunConfig) -> None:
    """Raises ConfigError for a value that no runner accepts."""
    if not run.model_file.exists():
        models = sorted(file.stem for file in MODELS.glob("*.json"))
        raise ConfigError(
            f"model={run.model!r}: no such file{nearest(run.model, models)}; there are {models}, and paths of a model "
            "directory, a config.json or a GGUF file"
        )
    if run.mode == "simulated" and run.device not in devices() and not Path(run.device).is_file():
        raise ConfigError(
            f"device={run.device!r} is unknown{nearest(run.device, devices())}; there are {', '.join(devices())}, and "
            "paths of such files"
        )
    systems = SYSTEMS if run.mode == "simulated" else (*SYSTEMS, "peft-mixed")
    refuse_unknown([run.system.name], systems, "system.name=")
    generator = find_generator(run.workload.kind)
    own = _parameters(generator)
    refuse_unknown(run.workload.parameters, own, f"workload (kind: {run.workload.kind}): ")
    for name, parameter in inspect.signature(generator).parameters.items():
        if name in own and parameter.default is parameter.empty and name not in run.workload.parameters:
            raise ConfigError(f"workload.{name}: must be given for kind: {run.workload.kind}")
    for name, least in (
        ("adapters.count", 0), ("client.users", 1), ("client.think_seconds", 0), ("engine.batch", 1),
    ):  # fmt: skip
        if run.value(name) < least:
            raise ConfigError(f"{name}={run.value(name)}: must be at least {least}")
    for name in ("workload.rate", "workload.duration", "slo_seconds", "dollars_per_hour"):
        value = run.value(name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value}: must be positive")
    if not run.adapters.ranks or min(run.adapters.ranks) < 1:
        raise ConfigError(f"adapters.ranks={list(run.adapters.ranks)}: must be positive integers, one at least")
    for mode, section in (("load_test", run.load_test), ("replicas", run.replicas)):
        if (run.mode == mode) != (section is not None):
            raise ConfigError(f"mode={run.mode}: the section {mode} belongs to mode={mode}; give both or neither")
    if run.measured is not None and run.mode in ("simulated", "served"):
        raise ConfigError(f"mode={run.mode}: has no rounds; leave the section measured out, or use mode=real")
    for name, numbers in run.measured.groups.items() if run.measured else ():
        if not isinstance(numbers, list) or len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
            raise ConfigError(f"measured.groups.{name}={numbers!r}: must be [first, last + 1] adapter numbers")
    if not run.adapters.targets:
        raise ConfigError("adapters.targets=[]: must name one projection at least")
    if run.system.policy is not None:
        if "name" not in run.system.policy:
            raise ConfigError(f"system.policy={dict(run.system.policy)}: must have a name")
        make_policy(**run.system.policy)


_WITHOUT_EFFECT = (
    "adapters.path", "client.think_seconds", "system.policy", "system.eviction", "measured.load",
    "measured.disk_seconds", "measured.groups",
)  # fmt: skip
"""Fields that have no effect in the modes which start servers for a run."""


def _check_servers(run: RunConfig, content: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that servers started for the run cannot have. content: of the file."""
    without_effect = (*_WITHOUT_EFFECT, "adapters.targets") if run.mode == "load_test" else _WITHOUT_EFFECT
    for name in without_effect:
        section, field_name = name.split(".")
        section_given = content.get(section)
        given = section_given if isinstance(section_given, Mapping) else {"path": section_given}
        if given.get(field_name) is not None:
            raise ConfigError(f"{name}={run.value(name)!r}: has no effect with mode={run.mode}; leave it out")
    if not run.model_file.is_file() or run.has_weights:
        raise ConfigError(
            f"model={run.model!r}: mode={run.mode} makes random weights; name a file of experiments/models, or the "
            "path of a config.json"
        )
    if run.adapters.count < 1:
        raise ConfigError(f"adapters.count={run.adapters.count}: must be at least 1 with mode={run.mode}")
    if "requests" not in _parameters(find_generator(run.workload.kind)):
        kinds = [kind for kind, generator in WORKLOADS.items() if "requests" in _parameters(generator)]
        raise ConfigError(f"workload.kind={run.workload.kind}: mode={run.mode} needs one of {', '.join(kinds)}")
    if "requests" not in run.workload.parameters:
        raise ConfigError(f"workload.requests: must be given with mode={run.mode}")


def _parameters(generator: Any) -> dict[str, Any]:
    hints = get_type_hints(generator)
    return {name: hints[name] for name in inspect.signature(generator).parameters if name not in _GIVEN}
