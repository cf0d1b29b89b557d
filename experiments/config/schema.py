"""The settings of a run: plain values in sections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from slora_jax.demo.models import SMOLLM2
from slora_jax.demo.smollm2 import smollm2_path
from slora_jax.models.config import ModelConfig, read_json
from slora_jax.typed import Count, Seconds, Share

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
      trained: directory of PEFT directories that take the place of as many random adapters; None: all are random.
      directory: keeps model and adapters for the next run; None: a temporary one.
    """

    side: Literal["alone", "served", "soak"] = "served"
    warm_up: Count = 64
    soak_seconds: Seconds = 240.0
    temperature: Seconds = 0.8
    top_p: Share = 0.95
    trained: Path | None = None
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
        a Hugging Face directory or GGUF file with weights; "smollm2" stands for the installed SmolLM2.
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
        if self.model == SMOLLM2 and (found := smollm2_path()) is not None:
            return found
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
        if self.load_test is not None and self.load_test.trained is None:
            del given["load_test"]["trained"]
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
