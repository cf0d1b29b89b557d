"""Random adapters with a visible effect, for demos, benchmarks and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.peft_format import adapter_of
from slora_jax.adapters.targets import resolve_targets
from slora_jax.errors import AdapterError
from slora_jax.models.projections import PROJECTIONS


def random_adapter(
    geometry: BaseGeometry,
    rank: int | Mapping[str, int] = 8,
    targets: Sequence[str] = tuple(PROJECTIONS),
    alpha: float | None = None,
    seed: int = 0,
    scale_of_b: float = 0.5,
) -> LoraAdapter:
    """A float32 adapter with normally distributed, nonzero A and B in every layer.

    Args:
      rank: one rank for all `targets`, or a rank per projection, which replaces `targets`; 0: not adapted.
      alpha: PEFT's `lora_alpha`; None: the largest rank.
      scale_of_b: for inputs of unit variance the update has standard deviation `scale_of_b * alpha / rank`.
    """
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    ranks = {projection: r for projection, r in ranks.items() if r}
    unknown = ranks.keys() - PROJECTIONS.keys()
    if unknown or not ranks:
        raise AdapterError(f"targets: expected some of {', '.join(PROJECTIONS)}, found {sorted(ranks) or 'none'}")
    suffixes = {p: PROJECTIONS[p].module.split(".")[-1] for p in PROJECTIONS if p in ranks}
    largest = max(ranks.values())
    config = LoraConfig.from_json(
        {
            "peft_type": "LORA",
            "r": largest,
            "lora_alpha": largest if alpha is None else alpha,
            "target_modules": list(suffixes.values()),
            "rank_pattern": {suffix: ranks[p] for p, suffix in suffixes.items() if ranks[p] != largest},
        }
    )
    resolved = resolve_targets(config, geometry.num_layers)
    rng = np.random.default_rng(seed)
    a, b = {}, {}
    for key, target in resolved.items():
        d_in, d_out = geometry.dims(key[1])
        a[key] = rng.standard_normal((target.rank, d_in), np.float32) / np.float32(math.sqrt(d_in))
        b[key] = rng.standard_normal((d_out, target.rank), np.float32) * np.float32(scale_of_b / math.sqrt(target.rank))
    return adapter_of(config, resolved, a, b, geometry.num_layers)
