"""Resolves an adapter's config to projections, ranks and scales by PEFT's own rules, from module names alone."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pallas_kernels.lora.layout import EXPERT_PROJECTIONS
from slora_jax.adapters.config import EXPERT_PARAMETERS, LoraConfig, layer_regex, pattern_regex
from slora_jax.adapters.tensor_names import PLAIN
from slora_jax.adapters.untrusted.patterns import Matcher
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.errors import AdapterError

DEFAULT_TARGETS = ("q_proj", "v_proj", "query_key_value")
"""PEFT's targets when `target_modules` is null: the first two in most families, the last one in GLM-4."""

OTHER_MODULES = ("", ".layers", ".norm", ".rotary_emb")
OTHER_LAYER_MODULES = (
    *("", ".self_attn", ".self_attn.q_norm", ".self_attn.k_norm"),
    *(".mlp", ".mlp.act_fn", ".mlp.gate", ".mlp.experts"),
    *(".input_layernorm", ".post_attention_layernorm", ".post_self_attn_layernorm", ".post_mlp_layernorm"),
    *(".pre_feedforward_layernorm", ".post_feedforward_layernorm"),
)


@dataclass(frozen=True)
class Target:
    """One adapted projection: `y += scale * B @ (A @ x)` with A `[rank, d_in]`."""

    rank: int
    scale: float


def resolve_targets(
    config: LoraConfig,
    num_layers: int,
    parent: str = "model",
    modules: Mapping[str, str] = PLAIN,
    ends: Collection[str] | None = None,
    expert_layers: Sequence[bool] = (),
) -> dict[tuple[int, str], Target]:
    """Resolves a config to the targets that PEFT would adapt in the layers of a model.

    Args:
      parent: name of the module that contains the layers.
      modules: each projection's module within a layer. The projections of a fused module are all targets, or none.
      ends: which of the modules embed_tokens and lm_head, and of those of experts, the adapter changes; None refuses a
        config that targets the first two.
      expert_layers: whether each layer has experts in place of gate, up and down; empty: none has.

    Returns:
      `(layer, projection) -> Target`, in layer-major order.

    Raises:
      AdapterError: the config targets another module than the seven projections, or nothing at all.
    """
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is set to True but the targets are linear layers; it has no effect", stacklevel=2)
    matcher = Matcher()
    is_target = _is_linear if _is_all_linear(config) else is_targeted
    if not _is_all_linear(config):
        layers = (f"{parent}.layers.{i}{suffix}" for i in range(num_layers) for suffix in OTHER_LAYER_MODULES)
        others = (*(parent + suffix for suffix in OTHER_MODULES), *(_ends(parent) if ends is None else ()), *layers)
        for name in others:
            if is_targeted(config, name, matcher):
                raise AdapterError(
                    f"target_modules: matches {name!r}; only attention and MLP projections can be adapted"
                )
    targets = {}
    for layer in range(num_layers):
        for projection, module in modules.items():
            name = f"{parent}.layers.{layer}.{module}"
            if projection in EXPERT_PROJECTIONS and expert_layers and expert_layers[layer]:
                continue
            if is_target(config, name, matcher):
                targets[layer, projection] = _target(config, name, matcher)
    if not targets and not ends:
        raise AdapterError(
            f"target_modules: {quoted(config.target_modules)} with exclude_modules {quoted(config.exclude_modules)} "
            f"and layers_to_transform {quoted(config.layers_to_transform)} matches no projection of the {num_layers} "
            f"layers{_nearest(config.target_modules, modules)}"
        )
    return targets


def resolve_ends(config: LoraConfig, parent: str = "model") -> dict[str, Target]:
    """Resolves a config to the targets among embed_tokens and lm_head, by module. "all-linear" has neither.

    Raises:
      AdapterError: an active field does not apply to them.
    """
    matcher = Matcher()
    if config.target_modules is None or _is_all_linear(config):
        return {}
    names = {name.split(".")[-1]: name for name in _ends(parent) if is_targeted(config, name, matcher)}
    for field in ("use_dora", "lora_bias", "ensure_weight_tying", "alora_invocation_tokens"):
        if names and getattr(config, field):
            raise AdapterError(f"{field}: is not supported together with LoRA on {' and '.join(names)}; must be unset")
    return {module: _target(config, name, matcher) for module, name in names.items()}


def resolve_modules(config: LoraConfig, names: Iterable[str]) -> dict[str, Target]:
    """Resolves a config to the targets among linear modules, by their full names."""
    matcher = Matcher()
    is_target = _is_linear if _is_all_linear(config) else is_targeted
    return {name: _target(config, name, matcher) for name in names if is_target(config, name, matcher)}


def resolve_parameters(
    config: LoraConfig, layers: Iterable[int], parent: str = "model"
) -> dict[int, dict[str, Target]]:
    """Resolves a config to the targets among the stacked parameters of experts: by layer and `EXPERT_PARAMETERS`.

    Args:
      layers: the layers with experts.

    Raises:
      AdapterError: a name matches no parameter.
    """
    wanted, matcher = config.target_parameters or (), Matcher()
    targets: dict[int, dict[str, Target]] = {}
    matched = set()
    for layer in layers:
        for parameter in EXPERT_PARAMETERS:
            name = f"{parent}.layers.{layer}.mlp.experts.{parameter}"
            if found := [one for one in wanted if f".{name}".endswith(f".{one}")]:
                matched.update(found)
                targets.setdefault(layer, {})[parameter] = _target(config, name, matcher)
    if unmatched := [one for one in wanted if one not in matched]:
        raise AdapterError(
            f"target_parameters: {quoted(unmatched[0])} matches no parameter of experts of the base model"
        )
    return targets


def _ends(parent: str) -> tuple[str, str]:
    return f"{parent}.embed_tokens", "lm_head"


def is_targeted(config: LoraConfig, name: str, matcher: Matcher) -> bool:
    """Returns whether PEFT adapts the module `name` (peft.tuners.tuners_utils.check_target_module_exists)."""
    if _is_excluded(config, name, matcher):
        return False
    wanted = config.target_modules
    if wanted is None:
        wanted = () if config.target_parameters else DEFAULT_TARGETS
    if isinstance(wanted, str):
        return matcher.fullmatch("target_modules", wanted, name)
    if name in wanted:
        return True  # layers_to_transform does not apply to full names
    return _has_suffix(name, wanted) and _in_layers(config, name, matcher)


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _is_linear(config: LoraConfig, name: str, matcher: Matcher) -> bool:
    """Returns whether "all-linear" means the linear module `name`."""
    return not _is_excluded(config, name, matcher)


def _is_excluded(config: LoraConfig, name: str, matcher: Matcher) -> bool:
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return matcher.fullmatch("exclude_modules", excluded, name)
    return name in excluded or _has_suffix(name, excluded)


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(name.endswith(f".{suffix}") for suffix in suffixes)


def _in_layers(config: LoraConfig, name: str, matcher: Matcher) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    if config.layers_pattern:
        patterns = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern
        matches = (matcher.match("layers_pattern", layer_regex(pattern), name) for pattern in patterns)
        match = next(filter(None, matches), None)
    else:
        match = matcher.match("layers_to_transform", r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    if match is None or match["idx"] is None:
        return False
    return int(match["idx"]) in ((wanted,) if isinstance(wanted, int) else wanted)


def _pattern_key(field: str, patterns: Iterable[str], name: str, matcher: Matcher) -> str:
    """The first pattern that matches the end of `name`, else `name` (peft.utils.other.get_pattern_key)."""
    return next((key for key in patterns if matcher.match(field, pattern_regex(key), name)), name)


def _target(config: LoraConfig, name: str, matcher: Matcher) -> Target:
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(_pattern_key("rank_pattern", ranks, name, matcher), config.r)
    alpha = alphas.get(_pattern_key("alpha_pattern", alphas, name, matcher), config.lora_alpha)
    return Target(rank=rank, scale=alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _nearest(targets: tuple[str, ...] | str | None, modules: Mapping[str, str]) -> str:
    """The module names nearest to the first three targets, as the end of a message."""
    known = list(dict.fromkeys(module.split(".")[-1] for module in modules.values()))
    names = targets[:3] if isinstance(targets, tuple) else ()
    near = dict.fromkeys(one for name in names for one in difflib.get_close_matches(clipped(name), known, n=1))
    return f"; nearest names: {', '.join(near or known)}"
