"""Checks of the arguments that all generators take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slora_jax import ConfigError


def check_arguments(
    kind: str, *, num_adapters: int, ranks: Sequence[int], rate: float, duration: float, **positive: float
) -> None:
    """Checks the common arguments. kind: the generator's name. positive: its own arguments that must be positive.

    Raises:
      ConfigError: an argument is out of range.
    """
    if num_adapters < 0:
        raise ConfigError(f"{kind}: num_adapters={num_adapters}: must be at least 0, the base model alone")
    if num_adapters and not ranks:
        raise ConfigError(f"{kind}: ranks={ranks!r}: must name at least one rank")
    for name, value in {"rate": rate, "duration": duration, **positive}.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{kind}: {name}={value}: must be positive")


def check_range(kind: str, **ranges: tuple[int, int]) -> None:
    """Checks ranges of lengths, [low, high).

    Raises:
      ConfigError: a range is empty, or has a length below 1.
    """
    for name, (low, high) in ranges.items():
        if not 1 <= low < high:
            raise ConfigError(f"{kind}: {name}={[low, high]}: must be [low, high) with 1 <= low < high")


def ranks_in_turn(num_adapters: int, ranks: Sequence[int]) -> tuple[int, ...]:
    """Returns the rank of each adapter: they take the setting's ranks in turn."""
    return tuple(ranks[i % len(ranks)] for i in range(num_adapters))
