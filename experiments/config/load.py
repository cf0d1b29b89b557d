"""Config files, YAML or gin: the runs of an experiment, from its cases and sweeps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.config.content import known_fields, run_config, section_fields
from experiments.config.schema import SECTIONS, RunConfig
from slora_jax import ConfigError
from slora_jax.typed import is_sweep, typed

LABELS = {"panel": str, "curve": str, "x": str, "published": str}
ABOUT = {"title": str, "about": str, "metrics": tuple[str, ...], "expected_seconds": float}


@dataclass(frozen=True)
class Run:
    """A run and its place in the figure.

    Attributes:
      panel: "" in an experiment of one panel.
      curve: by default the system's name, with the policy if runs of the system differ in it.
      x: the field on the panel's axis, by its dotted name.
      published: the paper's file of raw results that has the same run; "": none.
    """

    config: RunConfig
    panel: str = ""
    curve: str = ""
    x: str = "workload.rate"
    published: str = ""


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
      name: of the file, without its suffix.
      about: what it shows, and what to expect.
      metrics: the figures that plots show.
      expected_seconds: on two cores.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    about: str = ""
    metrics: tuple[str, ...] = ("throughput",)
    expected_seconds: float | None = None


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a `.yaml` or `.gin` file.

    A list for a field is a sweep over its values; several lists give every combination, the last varying fastest. (For
    a field that itself is a list, such as `adapters.ranks`, a sweep is a list of lists.) `cases` is a list of changes
    to the fields beside it, each with its own sweeps and cases. overrides: `workload.rate=3`, `seed=[1,2,3]`, for every
    case.

    Raises:
      ConfigError: the file is missing or not a config, a name is unknown, or a value is wrong; the message says where.
    """
    file = Path(file)
    if not file.is_file():
        near = sorted(str(one) for one in file.parent.glob("*") if one.suffix in (".yaml", ".gin"))
        raise ConfigError(f"{file}: no such file" + (f"; there are {', '.join(near)}" if near else ""))
    if file.suffix not in (".yaml", ".gin"):
        raise ConfigError(f"{file}: must end in .yaml or .gin")
    content = _read_yaml(file) if file.suffix == ".yaml" else _read_gin(file)
    try:
        return make_experiment(file.stem, content, _overrides(overrides))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def make_experiment(name: str, content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Makes an experiment from the content of a file.

    Raises:
      ConfigError: as `load_experiment`.
    """
    content = dict(content)
    about = {key: typed(content.pop(key), kind, key) for key, kind in ABOUT.items() if key in content}
    made: list[tuple[RunConfig, dict[str, Any]]] = []
    for case in _cases(content):
        for one in _sweep(_merged(case, overrides or {})):
            labels = {key: typed(one.pop(key), kind, key) for key, kind in LABELS.items() if key in one}
            config = run_config(one)
            test = config.load_test
            if test is None or test.side != "soak" or test.soak_seconds:
                made.append((config, labels))
    policies: dict[str, set[str]] = {}  # of each system's runs without a label
    for config, labels in made:
        if "curve" not in labels:
            policies.setdefault(config.system.name, set()).add(_policy_text(config))
    runs = []
    for config, labels in made:
        system = config.system.name
        several = len(policies.get(system, ())) > 1
        labels.setdefault("curve", f"{system}, {_policy_text(config)}" if several else system)
        runs.append(Run(config, **{key: _filled(text, config) for key, text in labels.items()}))
    about.setdefault("title", name)
    return Experiment(name=name, runs=tuple(runs), **about)


def _policy_text(config: RunConfig) -> str:
    """Returns a policy as text for a curve's name: `early_abort slo=6.0`."""
    policy = dict(config.system.policy or {"name": "default policy"})
    return " ".join([str(policy.pop("name")), *(f"{name}={value}" for name, value in policy.items())])


def _cases(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cases = content.get("cases")
    shared = {key: value for key, value in content.items() if key != "cases"}
    if cases is None:
        yield shared
        return
    if not isinstance(cases, list) or not cases or not all(isinstance(case, Mapping) for case in cases):
        raise ConfigError(f"cases={cases!r}: must be a list of changes, one at least")
    for case in cases:
        yield from _cases(_merged(shared, case))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two contents, section by section: `above` wins; lists and policies are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "policy"
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _sweep(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields every combination of the values of fields that have lists."""
    axes: list[tuple[str | None, str, list[Any]]] = []
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, Mapping):
            known = section_fields(name, value)
            axes += [(name, key, one) for key, one in value.items() if is_sweep(one, known.get(key))]
        elif is_sweep(value, known_fields("").get(name, str)):
            axes.append((None, name, value))
    for section, name, values in axes:
        if not values:
            raise ConfigError(f"{f'{section}.' if section else ''}{name}=[]: a sweep must have one value at least")
    for chosen in itertools.product(*(values for _, _, values in axes)):
        one = {name: dict(value) if isinstance(value, Mapping) else value for name, value in content.items()}
        for (section, name, _), value in zip(axes, chosen, strict=True):
            (one if section is None else one[section])[name] = value
        yield one


def _filled(text: str, config: RunConfig) -> str:
    """Replaces `{workload.cv}` and so on by the run's values."""
    return re.sub(r"\{([\w.]+)\}", lambda match: str(config.value(match[1])), text)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a mapping of fields")
    return content  # type: ignore[return-value]


def _section(**values: Any) -> dict[str, Any]:
    return values


_GIN = {name: gin.external_configurable(_section, name=name, module="config") for name in ("experiment", *SECTIONS)}


def _read_gin(file: Path) -> dict[str, Any]:
    """Reads a gin file. Fields of the run and of the experiment are bound to `experiment`, those of a section to its
    name: `experiment.title = "..."`, `workload.rate = [1, 2]`."""
    try:
        gin.clear_config()
        gin.parse_config_file(str(file))
        sections = {name: made for name, section in _GIN.items() if (made := section())}
    except (ValueError, SyntaxError, OSError) as error:
        raise ConfigError(f"{file}: {error}") from error
    finally:
        gin.clear_config()
    return sections.pop("experiment", {}) | sections


def _overrides(texts: Iterable[str]) -> dict[str, Any]:
    for text in texts:
        name, equals, _ = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: must be name=value, as in workload.rate=3")
        if name.split(".")[0] in ("cases", *ABOUT):
            raise ConfigError(f"{name}: can be changed in the file only")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)))  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(texts)}: {error}") from error
