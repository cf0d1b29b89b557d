"""Parts of a model's config: rotary embedding, experts, and the kinds of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
Norms = Literal["before", "around", "after"]
"""Placement of a layer's norms: before attention and feed-forward, before and after, or after."""
Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["head", "width"]
"""Norm of queries and keys: of each head, or of a projection's whole width."""
WeightFormat = Literal["int8", "fp8", "int4"]
"""Format of quantised kernels (`models.quantised`)."""
INT4_GROUP = 128
"""Inputs that share a scale of "int4", if their number divides d_in."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and the scaling applied to it.

    Attributes:
      factor: for "linear", "llama3" and "yarn".
      low_freq_factor, high_freq_factor: for "llama3", in the notation of the Llama 3.1 release.
      original_max_position_embeddings: for "llama3", "yarn" and "longrope", in tokens.
      divisors: further divisors of the frequencies, one per rotated pair (GGUF's form of Llama 3's scaling, and
        "longrope" for sequences up to the original length), or empty.
      long_divisors: the divisors of "longrope" if sequences can be longer than the original length.
      partial_rotary_factor: share of a head that is rotated; the other components keep their values.
      interleaved: whether a pair is two neighbouring components instead of two that are half a head apart.
      attention_factor: multiplies cosines and sines, for "yarn" and "longrope".
      beta_fast, beta_slow, truncate: limits of the ramp of "yarn".
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def rotated(self, head_dim: int) -> int:
        """Number of rotated components of a head."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer and their router.

    Attributes:
      count: number of experts.
      per_token: number of experts of a token.
      intermediate_size: width of an expert's hidden layer.
      normalised: whether the weights of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool


@dataclass(frozen=True)
class LayerKind:
    """The traits in which layers of one model differ. Layers of one kind share their compiled program.

    Attributes:
      window: number of newest keys that a query attends to, its own included; None: all.
      rope: index in `ModelConfig.ropes`; None: queries and keys are not rotated.
      has_experts: whether the feed-forward part consists of experts.
    """

    window: int | None
    rope: int | None
    has_experts: bool
