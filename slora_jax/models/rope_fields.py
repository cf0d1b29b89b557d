"""Reads the rotary embedding of a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slora_jax.models.fields import Fields, positive_int, positive_number, refused
from slora_jax.models.traits import RopeConfig, RopeKind

_REQUIRED: dict[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"short_factor", "long_factor"}),
}
_OPTIONAL: dict[RopeKind, frozenset[str]] = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "attention_factor"}),
}
_SCALED_FROM_ORIGINAL = ("llama3", "yarn", "longrope")


def read_rope(
    fields: Fields, max_positions: int, head_dim: int, *, partial: float | None = None, interleaved: bool = False
) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Args:
      max_positions: `max_position_embeddings`.
      partial: share of a head that is rotated if the file names none; None: the family rotates whole heads.
      interleaved: see `RopeConfig`.
    """
    merged = merged_rope_fields(fields)
    if partial is not None:
        merged.setdefault("partial_rotary_factor", partial)
    elif (given := merged.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise refused("partial_rotary_factor", given, "1.0")
    return rope_of(merged, max_positions, head_dim, interleaved)


def rope_of(fields: Mapping[str, Any], max_positions: int, head_dim: int, interleaved: bool = False) -> RopeConfig:
    """Reads one rotary embedding. fields: under their names in transformers 5, without null values."""
    fields = dict(fields)
    name = fields.pop("rope_type", "default")
    if name not in _REQUIRED:
        raise refused("rope_type", name, f"one of {sorted(_REQUIRED)}")
    kind: RopeKind = name
    theta = positive_number("rope_theta", fields.pop("rope_theta"))
    partial = fields.pop("partial_rotary_factor", 1.0)
    if not isinstance(partial, int | float) or not 0 < partial <= 1 or int(head_dim * partial) % 2:
        raise refused(
            "partial_rotary_factor", partial, f"a share of head_dim={head_dim} with an even number of components"
        )
    original = positive_int(
        "original_max_position_embeddings", fields.pop("original_max_position_embeddings", max_positions)
    )
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, frozenset())
    if not required <= fields.keys() <= required | optional:
        beside = f", and possibly some of {sorted(optional)}" if optional else ""
        raise refused(f"rope_parameters of rope_type {kind!r}", sorted(fields), f"exactly {sorted(required)}{beside}")
    values: dict[str, Any] = {"partial_rotary_factor": float(partial), "interleaved": interleaved}
    if kind in _SCALED_FROM_ORIGINAL:
        values["original_max_position_embeddings"] = original
    if "factor" in required:
        values["factor"] = positive_number("factor", fields["factor"])
    if kind == "llama3":
        low, high = (positive_number(name, fields[name]) for name in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise refused("high_freq_factor", high, f"above low_freq_factor={low}")
        values |= {"low_freq_factor": low, "high_freq_factor": high}
    elif kind == "yarn":
        values |= _yarn(fields, values["factor"])
    elif kind == "longrope":
        values |= _longrope(fields, max_positions, original, int(head_dim * partial) // 2)
    return RopeConfig(theta, kind, **values)


def _yarn(fields: Mapping[str, Any], factor: float) -> dict[str, Any]:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in fields:
        attention = positive_number("attention_factor", fields["attention_factor"])
    elif fields.get("mscale") and fields.get("mscale_all_dim"):
        attention = scale(fields["mscale"]) / scale(fields["mscale_all_dim"])
    else:
        attention = scale(1.0)
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise refused("truncate", truncate, "true or false")
    return {
        "attention_factor": attention,
        "beta_fast": positive_number("beta_fast", fields.get("beta_fast") or 32),
        "beta_slow": positive_number("beta_slow", fields.get("beta_slow") or 1),
        "truncate": truncate,
    }


def _longrope(fields: Mapping[str, Any], max_positions: int, original: int, pairs: int) -> dict[str, Any]:
    divisors = {}
    for name in ("short_factor", "long_factor"):
        given = fields[name]
        if not isinstance(given, list | tuple) or len(given) != pairs:
            raise refused(name, given, f"{pairs} positive numbers, one for each rotated pair")
        divisors[name] = tuple(positive_number(name, one) for one in given)
    factor = positive_number("factor", fields.get("factor", max_positions / original))
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "divisors": divisors["short_factor"],
        "long_divisors": divisors["long_factor"],
        "attention_factor": positive_number("attention_factor", fields.get("attention_factor", attention)),
    }


def merged_rope_fields(fields: Fields) -> dict[str, Any]:
    """The rope fields from all places in the file, under their transformers 5 names.

    `rope_theta` is the family's if the file has none. Rejects contradictions.
    """
    merged: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
        found = fields.get(source) if source in fields.given else None
        if source in ("rope_theta", "partial_rotary_factor"):
            found = {source: found}
        if not isinstance(found, Mapping | None):
            raise refused(source, found, "a dictionary or null")
        for name, value in (found or {}).items():
            name = "rope_type" if name == "type" else name
            if value is not None and merged.setdefault(name, value) != value:
                raise refused(f"{source}: {name}", value, f"the value given elsewhere in the file, {merged[name]!r}")
    merged.setdefault("rope_theta", fields.defaults["rope_theta"])
    return merged
