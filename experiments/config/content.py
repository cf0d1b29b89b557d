"""A run from the content of a file: names and types, section by section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

from experiments.config.checks import check, check_servers, generator_arguments
from experiments.config.schema import SECTIONS, AdaptersConfig, RunConfig, Target, adapter_directories
from experiments.workloads import WORKLOADS, find_generator
from slora_jax import ConfigError
from slora_jax.adapters import LoraConfig
from slora_jax.adapters.targets import resolve_targets
from slora_jax.simulation import SystemConfig
from slora_jax.typed import refuse_unknown, typed

_OPEN = {"workload": "parameters", "system": "settings"}
"""Sections that take other names beside their fields, and the field that holds these."""


@cache
def known_fields(section: str) -> dict[str, Any]:
    """Returns the names that a section of a file may have ("": the run itself), with their types."""
    kind = SECTIONS.get(section, RunConfig)
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name: hints[f.name] for f in fields(kind) if f.name not in (_OPEN.get(section), *SECTIONS)}
    if section == "workload":
        for generator in WORKLOADS.values():
            known |= generator_arguments(generator)
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
                known |= generator_arguments(find_generator(kind))
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
    check(run)
    if run.mode in ("load_test", "replicas"):
        check_servers(run, content)
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
