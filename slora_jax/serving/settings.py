"""Settings of the service, from a YAML file and the command line."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml

from slora_jax.engine.config import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.typed import Count, Positive, Range, Seconds, check_fields, made, refuse_unknown, typed

if TYPE_CHECKING:  # these import JAX, which takes seconds
    from slora_jax.distributed.group import ProcessGroup
    from slora_jax.engine import Engine
    from slora_jax.scheduling import Policy


Right = Literal["serve", "manage", "train"]
"""Rights of an API key: to generate; to load and unload adapters; to train adapters."""


@dataclass(frozen=True)
class ApiKey:
    """A client's key, kept as its SHA-256 only."""

    name: str
    digest: bytes = field(repr=False)
    rights: frozenset[str]

    @classmethod
    def from_mapping(cls, data: Any, where: str) -> ApiKey:
        """Reads an entry of a config file: `name`, `rights` (default: "serve") and one of `key`, `key_env` (an
        environment variable) and `key_sha256` (hexadecimal).

        Raises:
          ConfigError: naming the field, but never the key.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: must be a mapping")
        sources = ("key", "key_env", "key_sha256")
        refuse_unknown(data, ("name", "rights", *sources), f"{where}.")
        name = typed(data.get("name") or None, str, f"{where}.name")
        given = [one for one in sources if one in data]
        if len(given) != 1:
            raise ConfigError(f"{where}: give one of key, key_env and key_sha256, found {', '.join(given) or 'none'}")
        rights = typed(data.get("rights", ["serve"]), tuple[Right, ...], f"{where}.rights")
        return cls(name, _digest(data[given[0]], given[0], f"{where}.{given[0]}"), frozenset(rights))


def _digest(value: Any, source: str, where: str) -> bytes:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: must be text")
    if source == "key_sha256":
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ConfigError(f"{where}: must be 64 hexadecimal digits, as `sha256sum` prints")
        return bytes.fromhex(value)
    if source == "key_env":
        if not os.environ.get(value):
            raise ConfigError(f"{where}={value!r}: this environment variable is not set")
        value = os.environ[value]
    return sha256(value.encode()).digest()


@dataclass(frozen=True)
class Limits:
    """Limits on clients. Requests that exceed one are rejected; other requests are unaffected.

    Attributes:
      body_bytes: size of a request's body (413). bodies_bytes: of all bodies being received (503).
      header_bytes: size of a request's head (431).
      waiting: sequences that wait beyond those that can run (503).
      per_client: unfinished sequences of one client (429): an API key or, without keys, an address.
      sequences: of one request, prompts times `n`.
      connections: open at once; further ones are closed.
      header_seconds, body_seconds: time to send a request (408).
      write_seconds: time to read an answer; then the client's requests are cancelled.
      adapter_loads: adapters read from disk at a time.
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
class TrainSettings:
    """Settings of training over HTTP (Tinker's API).

    Attributes:
      max_adapters: adapters in training at one time.
      max_lora_rank: largest rank of an adapter in training; at most the engine's.
      num_pages: pages of the training pool; None: enough for `max_adapters` adapters of the largest rank on all
        projections.
      lengths: row lengths (tokens), ascending; the longest bounds a sequence. One program is compiled for each.
      tokens: tokens of a micro-step, ascending.
      state_dir: directory of saved states; None: clients cannot save and load them.
      snapshots: unnamed sampler weights kept for each model; older ones are unloaded.
      session_seconds: time without a sign of the client after which its models are removed.
    """

    max_adapters: Count = 8
    max_lora_rank: Annotated[int, Range(least=1, most=256)] = 32
    num_pages: Count | None = None
    lengths: tuple[Count, ...] = (128, 512)
    tokens: tuple[Count, ...] = (1024,)
    state_dir: Path | None = None
    snapshots: Count = 8
    session_seconds: Positive = 600.0

    def __post_init__(self) -> None:
        check_fields(self, "train.")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `slora serve`; a config file has the same names (`from_file`).

    Attributes:
      model_dir: a Hugging Face directory or GGUF file.
      name: of the base model, for clients; None: the directory's name.
      adapters: each PEFT directory in it is registered under its folder's name; new ones are found every
        `watch_seconds` (0: only at the start).
      adapter_roots: further directories from which clients may load adapters.
      state_file: keeps adapters that clients loaded and unloaded for the next start; None: `.slora-adapters.json` in
        `adapters`.
      api_keys: keys and their rights; without keys, every client has every right.
      cors_origins: origins of web pages ("https://example.org", "*") whose browsers may call the service.
      engine: the engine's settings.
      policy: arguments of `make_policy`, a name and settings; None: first come, first served.
      tenants: what a fair-share policy charges: the "adapter" or the "client" (API key).
      http_processes: processes that parse, tokenize and stream beside the engine's; 0: the engine's process does it.
        Each of them has an equal part of `limits.connections` and `limits.bodies_bytes`.
      replicas: engines, one per process behind Ray Serve's router; 1: one engine in this process.
      replica_requests: maximum HTTP requests of a replica; further ones go to other replicas.
        None: 1.5 * `max_num_seqs`.
      train: settings of training over HTTP; None: none.
      drain_seconds: time for requests under way to end when the service stops.
      stall_seconds: longest call of the engine, such as a step; beyond it all requests fail, and `/health` returns 503
        until the call returns.
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
    http_processes: Annotated[int, Range(0, 64)] = 0
    replicas: Count = 1
    replica_requests: Count | None = None
    train: TrainSettings | None = None
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
        if self.train is not None and self.replicas > 1:
            raise ConfigError(f"replicas={self.replicas}: must be 1 with train; leave one of the two out")
        for name, is_given in (("train", self.train is not None), ("replicas above 1", self.replicas > 1)):
            if self.http_processes and is_given:
                count = self.http_processes
                raise ConfigError(f"http_processes={count}: must be 0 with {name}; leave one of the two out")
        self.make_policy()

    @classmethod
    def from_file(cls, path: Path | None, **given: Any) -> Self:
        """Reads a YAML file, if `path` is not None.

        Args:
          given: fields that take precedence unless they are None. `engine` and `train` may be mappings, merged with
            the file's.

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
        """Reads the content of such a file."""
        for name in ("engine", "train"):
            if isinstance(data.get(name) or {}, Mapping) and given.get(name) is not None:
                given[name] = {**(data.get(name) or {}), **given[name]}
        data = {**data, **{name: value for name, value in given.items() if value is not None}}
        if not isinstance(data.get("api_keys", ()), list | tuple):
            raise ConfigError("api_keys: must be a list of mappings")  # without the value, which may hold a key
        if "model_dir" not in data:
            raise ConfigError("model_dir is missing: a Hugging Face model directory or GGUF file")
        return made(cls, data, "")

    @cached_property
    def base_name(self) -> str:
        """Name of the base model, for clients."""
        return self.name or self.model_dir.resolve().name

    @property
    def roots(self) -> tuple[Path, ...]:
        """Directories from which adapters may be loaded."""
        return (*(() if self.adapters is None else (self.adapters,)), *self.adapter_roots)

    @property
    def is_loopback(self) -> bool:
        """Returns whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def make_policy(self) -> Policy | None:
        """Creates the policy. Raises ConfigError for an unknown one."""
        if self.policy is None:
            return None
        if "name" not in self.policy:
            raise ConfigError(f"policy={dict(self.policy)!r}: has no 'name'")
        from slora_jax.scheduling import make_policy

        return make_policy(**self.policy)

    def build_engine(self, processes: ProcessGroup | None = None) -> Engine:
        """Creates the engine. Raises as `Engine.from_pretrained` does."""
        from slora_jax.engine import Engine

        return Engine.from_pretrained(self.model_dir, self.engine, policy=self.make_policy(), processes=processes)
