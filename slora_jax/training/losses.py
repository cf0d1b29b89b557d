"""Losses as functions of the targets' log-probabilities, token by token.

`loss(logprobs, inputs) -> [N]` is traced by JAX. `inputs` has float32 `[N]` arrays by name: "weights", and those that
the examples give in `inputs`. An adapter's loss is the sum over its tokens. Each token's loss must depend on that token
alone; for others, see `Trainer.forward_backward_custom`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Loss = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


def cross_entropy(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """`-weight * logprob`."""
    return -inputs["weights"] * logprobs


def importance_sampling(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """`-advantage * p / q`, where q is the probability under the policy that sampled the token ("logprobs")."""
    return -inputs["weights"] * inputs["advantages"] * jnp.exp(logprobs - inputs["logprobs"])


def ppo(logprobs: jax.Array, inputs: Mapping[str, jax.Array], low: float = 0.8, high: float = 1.2) -> jax.Array:
    """PPO's clipped objective, with the ratio p / q clipped to `low .. high` (arXiv 1707.06347, equation 7)."""
    ratio, advantages = jnp.exp(logprobs - inputs["logprobs"]), inputs["advantages"]
    return -inputs["weights"] * jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)


def cispo(logprobs: jax.Array, inputs: Mapping[str, jax.Array], low: float = 0.8, high: float = 1.2) -> jax.Array:
    """CISPO: the clipped ratio is a constant factor of the log-probability (arXiv 2506.13585, equation 4)."""
    ratio = jax.lax.stop_gradient(jnp.clip(jnp.exp(logprobs - inputs["logprobs"]), low, high))
    return -inputs["weights"] * ratio * inputs["advantages"] * logprobs


LOSSES: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "cross_entropy": (cross_entropy, ()),
    "importance_sampling": (importance_sampling, ("logprobs", "advantages")),
    "ppo": (ppo, ("logprobs", "advantages")),
    "cispo": (cispo, ("logprobs", "advantages")),
}
"""Losses by name, each with the inputs that its examples must give."""
