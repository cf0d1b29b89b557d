"""Policies by the names that configs use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.scheduling.ageing import Ageing
from slora_jax.scheduling.clustering import Clustering
from slora_jax.scheduling.early_abort import EarlyAbort
from slora_jax.scheduling.merge import OneAdapter
from slora_jax.scheduling.policy import Fcfs, Lcfs, Policy
from slora_jax.scheduling.priority import Priority
from slora_jax.scheduling.vtc import Vtc
from slora_jax.typed import nearest

POLICIES: dict[str, type[Policy]] = {
    "fcfs": Fcfs,
    "lcfs": Lcfs,
    "early_abort": EarlyAbort,
    "clustering": Clustering,
    "vtc": Vtc,
    "one_adapter": OneAdapter,
    "priority": Priority,
    "ageing": Ageing,
}


def make_policy(name: str, **settings: Any) -> Policy:
    """Makes a policy: `make_policy("early_abort", slo=6.0)`, or your own class by `make_policy("my_module:Shortest")`.

    The inner policy of "ageing" is a policy, a name, or a mapping with the name and the settings:
    `make_policy("ageing", bound=10.0, inner={"name": "clustering", "max_adapters_in_batch": 4, "hard": True})`.

    Args:
      name: a key of `POLICIES`, or module:Class.
      settings: fields of the policy.

    Raises:
      ConfigError: the name or a setting is unknown (the message suggests the nearest), or a setting is missing or out
        of range.
    """
    kind = _imported(name) if ":" in name else POLICIES.get(name)
    if kind is None:
        raise ConfigError(
            f"policy {name!r} is unknown{nearest(name, POLICIES)}; there are {', '.join(POLICIES)}; give your own as "
            "module:Class"
        )
    known: list[str] = [field.name for field in fields(kind) if field.init] if is_dataclass(kind) else []
    for setting in settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"policy {name!r} has no setting {setting!r}{nearest(setting, known)}; {has}")
    inner = settings.get("inner")
    if isinstance(inner, str):
        settings["inner"] = make_policy(inner)
    elif isinstance(inner, Mapping):
        if "name" not in inner:
            raise ConfigError(f"policy {name!r}: inner={dict(inner)!r} has no 'name'")
        settings["inner"] = make_policy(**inner)
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError(f"policy {name!r}: {error}") from error


def _imported(name: str) -> type[Policy]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy {name!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise ConfigError(f"policy {name!r}: must be a subclass of slora_jax.scheduling.Policy")
    return kind
