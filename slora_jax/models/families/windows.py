"""Windows of all layers or of some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slora_jax.models.families.family import Sizes
from slora_jax.models.fields import Fields

KINDS = ("full_attention", "sliding_attention")


def layer_windows(fields: Fields, sizes: Sizes, default: Sequence[bool]) -> dict[str, Any]:
    """Reads `sliding_window` and `layer_types`.

    Args:
      default: whether each layer has the window, if the file has no `layer_types`.

    Returns:
      The traits of windows.
    """
    kinds = fields.per_layer("layer_types", sizes["num_layers"], KINDS)
    layers = default if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return {**one_window(fields, sizes), "window_layers": tuple(layers)}


def one_window(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    """Reads `sliding_window`. A window that is at least as long as the longest sequence is none."""
    if fields.get("sliding_window") is None:
        return {}
    window = fields.positive_int("sliding_window")
    return {"sliding_window": window if window < sizes["max_position_embeddings"] else None}
