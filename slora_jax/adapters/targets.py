"""Resolves an adapter's config to projections, ranks and scales by PEFT's own rules, from module names alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters.config import LoraConfig, layer_regex, pattern_regex
from slora_jax.adapters.geometry import module_name
from slora_jax.adapters.untrusted.patterns import Matcher
from slora_jax.adapters.untrusted.quoting import quoted
from slora_jax.errors import AdapterError

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's targets in Llama, Mistral, Qwen2 and Qwen3 when `target_modules` is null."""

OTHER_MODULES = ("", ".embed_tokens", ".layers", ".norm", ".rotary_emb")
OTHER_LAYER_MODULES = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")


@dataclass(frozen=True)
class Target:
    """One adapted projection: `y += scale * B @ (A @ x)` with A `[rank, d_in]`."""

    rank: int
    scale: float


def resolve_targets(config: LoraConfig, num_layers: int, parent: str = "model") -> dict[tuple[int, str], Target]:
    """Resolves a config to the targets that PEFT would adapt in a model of `num_layers` layers.

    Args:
      parent: name of the module that contains the layers.

    Returns:
      `(layer, projection) -> Target`, in layer-major order.

    Raises:
      AdapterError: the config targets another module than the seven projections (an embedding, lm_head), or no
        projection at all.
    """
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is set to True but the targets are linear layers; it has no effect", stacklevel=2)
    matcher = Matcher()
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    if not all_linear:
        layers = (f"{parent}.layers.{i}{suffix}" for i in range(num_layers) for suffix in OTHER_LAYER_MODULES)
        for name in (*(parent + suffix for suffix in OTHER_MODULES), "lm_head", *layers):
            if is_targeted(config, name, matcher):
                raise AdapterError(
                    f"target_modules: matches {name!r}; only attention and MLP projections can be adapted"
                )
    targets = {}
    for layer in range(num_layers):
        for projection in PROJECTIONS:
            name = module_name(layer, projection, parent)
            if not _is_excluded(config, name, matcher) if all_linear else is_targeted(config, name, matcher):
                targets[layer, projection] = _target(config, name, matcher)
    if not targets:
        raise AdapterError(
            f"target_modules: {quoted(config.target_modules)} with exclude_modules {quoted(config.exclude_modules)} "
            f"and layers_to_transform {quoted(config.layers_to_transform)} matches no projection of the {num_layers} "
            "layers"
        )
    return targets


def is_targeted(config: LoraConfig, name: str, matcher: Matcher) -> bool:
    """Returns whether PEFT adapts the module `name` (peft.tuners.tuners_utils.check_target_module_exists)."""
    if _is_excluded(config, name, matcher):
        return False
    wanted = DEFAULT_TARGETS if config.target_modules is None else config.target_modules
    if isinstance(wanted, str):
        return matcher.fullmatch("target_modules", wanted, name)
    if name in wanted:
        return True  # layers_to_transform does not apply to full names
    return _has_suffix(name, wanted) and _in_layers(config, name, matcher)


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
