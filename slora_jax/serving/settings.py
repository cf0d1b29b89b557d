"""The service's settings, from a YAML file and the command line."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml

from slora_jax.engine.config import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.serving.access import ApiKey
from slora_jax.typed import Count, Positive, Range, Seconds, check_fields, made

if TYPE_CHECKING:  # JAX, which settings must not wait for
    from slora_jax.distributed.group import ProcessGroup
    from slora_jax.engine import Engine
    from slora_jax.scheduling import Policy


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the service; beyond it, it is told so and nothing is lost.

    body_bytes: of a request (413). bodies_bytes: of all that are under way (503). header_bytes: of a request's head
    (431). waiting: sequences that wait beyond those that can run (503). per_client: sequences that one client may have
    unfinished (429); a client is an API key or, without keys, an address. sequences: of one request, prompts times `n`.
    connections: open at once; further ones are closed. header_seconds, body_seconds: for a client to send its request
    (408). write_seconds: for it to take what it is sent; then its requests are cancelled. adapter_loads: adapters that
    are read from disk at a time.
    """

    body_bytes: Count = 4 << 20
    bodies_bytes: Count = 256 << 20
    header_bytes: Count = 64 << 10
    waiting: Count = 1024
    per_client: Count = 512
    sequences: Count = 128
    connections: Count = 2048
    header_seconds: Positive = 10.0
    body_seconds: Positive = 30.0
    write_seconds: Positive = 30.0
    adapter_loads: Count = 2

    def __post_init__(self) -> None:
        check_fields(self, "limits.")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `slora serve`; a config file has the same names (`from_file`).

    model_dir: a Hugging Face directory or GGUF file. name: of the base model, for clients; None: the directory's name.
    adapters: every PEFT directory in it is registered under its folder's name, also those that come later (it is looked
      at every `watch_seconds`; 0: only at the start).
    adapter_roots: further directories from which clients may load adapters.
    state_file: remembers what clients loaded and unloaded, for the next start; None: `.slora-adapters.json` in
      `adapters`.
    api_keys: who may do what; none: everybody may do everything.
    cors_origins: web pages of other origins ("https://example.org", "*") that browsers let call the service.
    engine: the engine's settings. policy: a name and settings, as `make_policy` takes them; None: first come, first
      served. tenants: whom a fair-share policy charges: the "adapter" or the "client" (API key).
    replicas: engines, each in a process of its own behind Ray Serve's router (`replicas`); 1: one, in this process.
    replica_requests: HTTP requests with which a replica is full, so that those for its adapters go elsewhere; None: as
      many as its engine can run, and half as many that it can prepare for.
    drain_seconds: for requests under way to end when the service is stopped. stall_seconds: bound on one call of the
      engine, such as a step; beyond it all requests fail, and `/health` is 503 until the call returns.
    """

    model_dir: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    adapters: Path | None = None
    adapter_roots: tuple[Path, ...] = ()
    watch_seconds: Seconds = 2.0
    state_file: Path | None = None
    api_keys: tuple[ApiKey, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    policy: Mapping[str, Any] | None = None
    tenants: Literal["adapter", "client"] = "adapter"
    replicas: Count = 1
    replica_requests: Count | None = None
    drain_seconds: Seconds = 30.0
    stall_seconds: Positive = 120.0

    def __post_init__(self) -> None:
        check_fields(self, "")
        for name, root in (("adapters", self.adapters), *(("adapter_roots", root) for root in self.adapter_roots)):
            if root is not None and not root.is_dir():
                raise ConfigError(f"{name}={str(root)!r}: not a directory; make it, or name another")
        names = [key.name for key in self.api_keys]
        if len(set(names)) < len(names):
            raise ConfigError(f"api_keys: the names must differ, found {names}")
        self.make_policy()

    @classmethod
    def from_file(cls, path: Path | None, **given: Any) -> Self:
        """Reads a YAML file, if there is one. `given` fields, None for those that were not, take precedence; those of
        `engine` may be a mapping, laid over the file's.

        Raises:
          ConfigError: the file cannot be read; a field is unknown, missing or out of range.
        """
        if path is None:
            return cls.from_mapping({}, **given)
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(data, dict | None):
            raise ConfigError(f"{path}: must be a mapping of settings, found {type(data).__name__}")
        return cls.from_mapping(data or {}, **given)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], **given: Any) -> Self:
        """Like `from_file`, of what such a file holds."""
        engine = data.get("engine", {})
        if isinstance(engine, Mapping):
            engine = {**engine, **given.pop("engine", {})}
        data = {**data, **{name: value for name, value in given.items() if value is not None}, "engine": engine}
        if not isinstance(data.get("api_keys", ()), list | tuple):
            raise ConfigError("api_keys: must be a list of mappings")  # without the value: it may hold a key
        if "model_dir" not in data:
            raise ConfigError("model_dir is missing: a Hugging Face model directory or GGUF file")
        return made(cls, data, "")

    @property
    def base_name(self) -> str:
        """What clients call the base model."""
        return self.name or self.model_dir.resolve().name

    @property
    def roots(self) -> tuple[Path, ...]:
        """Where adapters may lie."""
        return (*(() if self.adapters is None else (self.adapters,)), *self.adapter_roots)

    @property
    def is_loopback(self) -> bool:
        """Returns whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def make_policy(self) -> Policy | None:
        """A new policy of the kind that was asked for. Raises ConfigError for an unknown one."""
        if self.policy is None:
            return None
        if "name" not in self.policy:
            raise ConfigError(f"policy={dict(self.policy)!r}: has no 'name'")
        from slora_jax.scheduling import make_policy

        return make_policy(**self.policy)

    def build_engine(self, processes: ProcessGroup | None = None) -> Engine:
        """The engine of these settings. Raises as `Engine.from_pretrained`."""
        from slora_jax.engine import Engine

        return Engine.from_pretrained(self.model_dir, self.engine, policy=self.make_policy(), processes=processes)
