"""Settings of a trainer and of an adapter's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from slora_jax.errors import ConfigError
from slora_jax.typed import Count, Positive, Range, check_fields, checks_keywords


@checks_keywords
@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a `Trainer`.

    Attributes:
      num_pages: pages of the training pool, including the dummy page. Weights, gradient and two moments are float32
        arrays of this size.
      max_adapters: adapters in training at one time.
      max_lora_rank: largest accepted rank of a projection. It sizes a small table and reserves no pages.
      lengths: row lengths, in tokens, that step programs exist for. An adapter's sequences are packed into rows of the
        smallest length that holds its longest sequence.
      tokens: tokens of a micro-step, ascending: a program has `max(1, tokens // length)` rows.
      remat: whether the backward pass of a layer computes its products and attention again instead of keeping their
        results. It takes more time; without it, each token takes `2 * (hidden_size + q_width +
        kv_width + intermediate_size)` elements per layer.
      dtype: of the base weights and activations, if the trainer loads the model itself. Weights of adapters, gradients
        and moments are float32 in any case.
      page_size: rows of a tile.
    """

    num_pages: Annotated[int, Range(least=2)]
    max_adapters: Count = 64
    max_lora_rank: Annotated[int, Range(least=1, most=256)] = 64
    lengths: tuple[Count, ...] = (128, 512, 2048)
    tokens: tuple[Count, ...] = (512, 2048)
    remat: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    page_size: Literal[8, 16, 32] = 16

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("lengths", "tokens"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ConfigError(f"TrainerConfig.{name}={values!r}: must be ascending, and not empty")
        if any(length % 16 for length in self.lengths):
            raise ConfigError(f"TrainerConfig.lengths={self.lengths!r}: must be multiples of 16")

    def num_rows(self, length: int) -> tuple[int, ...]:
        """Rows of the programs for rows of `length` tokens, ascending."""
        return tuple(sorted({max(1, tokens // length) for tokens in self.tokens}))


@checks_keywords
@dataclass(frozen=True)
class Adam:
    """AdamW for one adapter (`optax.adamw`). The defaults are those of Tinker's client.

    Attributes:
      learning_rate: a number, or an optax schedule: a function of the number of steps taken before this one.
      weight_decay: decoupled, and multiplied by the learning rate.
      clip_norm: largest norm of the adapter's gradient, to which a larger one is scaled down; 0: no limit.
    """

    learning_rate: float | Callable[[int], float] = 1e-4
    b1: Annotated[float, Range(least=0, most=1)] = 0.9
    b2: Annotated[float, Range(least=0, most=1)] = 0.95
    eps: Positive = 1e-12
    weight_decay: Annotated[float, Range(least=0)] = 0.0
    clip_norm: Annotated[float, Range(least=0)] = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps."""
        return float(self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate)
