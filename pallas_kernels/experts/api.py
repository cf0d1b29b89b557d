"""The weighted sum of the outputs of each token's experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import devices, fallback, plans
from pallas_kernels.experts import xla
from pallas_kernels.experts.plan import ExpertPlan, expert_plan
from pallas_kernels.weight_format import Kernels, codes_of

Implementation = Literal["xla", "triton"]
IMPLEMENTATIONS = get_args(Implementation)


def expert_outputs(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate_up: Kernels,
    down: Kernels,
    *,
    activation: str,
    implementation: Implementation | None = None,
    interpret: bool = False,
    plan: ExpertPlan | None = None,
    lora: Callable[[jax.Array], tuple[xla.Add, xla.Add]] | None = None,
) -> jax.Array:
    """Returns each token's sum of `weight * down(activation(gate(x)) * up(x))` over its experts. The bits of a token's
    result depend on no other token. Weights of experts that no token has chosen are not read. Differentiable in `x` and
    `weights`; the backward pass is the reference's.

    Args:
      x: `[T, d]`.
      chosen: int32 `[T, k]`, each token's experts. An entry of E is none.
      weights: float32 `[T, k]`.
      gate_up: `[E, d, 2 ffn]`, columns gate | up.
      down: `[E, ffn, d]`, like `gate_up` in x's dtype or quantised. "triton" takes codes of one byte: int8, and fp8 on
        Ada and Hopper.
      activation: of the gate, "silu" or "gelu_tanh".
      implementation: None: the plan table's for the current trace's device; the reference "xla" for float32 and on
        CPUs.
      interpret: run the Triton kernels in their interpreter.
      plan: block shapes of "triton"; None: the plan table's.
      lora: given the rows' order by expert, int32 `[T k]`, returns the LoRA products of gate | up and of down
        (`pallas_kernels.lora.experts`), which choose their implementation themselves. With it, there is no gradient.

    Returns:
      `[T, d]` in x's dtype. Products and sums accumulate in float32.

    Raises:
      NotImplementedError: the implementation is unknown, or does not take the format of the weights.
    """
    codes = codes_of(gate_up)
    name = fallback.choose("experts", implementation, x.dtype, _planned, partial(_check, codes.dtype))
    if name == "xla":
        return xla.expert_outputs(x, chosen, weights, gate_up, down, activation, lora)
    if plan is None:
        plan = expert_plan(rows_per_expert=-(-chosen.size // codes.shape[0]))
    if lora is not None:
        return _triton(activation, plan, interpret, x, chosen, weights, gate_up, down, lora)
    return _by_triton(activation, plan, interpret, x, chosen, weights, gate_up, down)


def _planned() -> str:
    return plans.find("experts", "backend")["backend"]


def _check(codes: Any, name: str) -> str:
    if name not in IMPLEMENTATIONS:
        available = ", ".join(map(repr, IMPLEMENTATIONS))
        raise NotImplementedError(f"expert_outputs: no implementation named {name!r}; available: {available}")
    device = devices.target()
    if name == "triton" and codes == jnp.int4:
        raise NotImplementedError("experts in Triton: int4 weights; int8 and fp8 are served, or implementation='xla'")
    if name == "triton" and codes == jnp.float8_e4m3fn and device is not None and device.compute_capability < 89:
        raise NotImplementedError(f"experts in Triton: fp8 weights on {device.name}; int8 is served")
    return name


def _triton(activation: str, plan: ExpertPlan, interpret: bool, *arguments: Any) -> jax.Array:
    from pallas_kernels.experts import triton  # not installed everywhere

    return triton.expert_outputs(*arguments, activation=activation, plan=plan, interpret=interpret)


_by_triton = jax.custom_vjp(_triton, nondiff_argnums=(0, 1, 2))


def _forward(activation: str, plan: ExpertPlan, interpret: bool, *arrays: Any) -> tuple[jax.Array, Any]:
    return _by_triton(activation, plan, interpret, *arrays), arrays


def _backward(activation: str, plan: ExpertPlan, interpret: bool, arrays: Any, slope: jax.Array) -> tuple[Any, ...]:
    x, chosen, weights, gate_up, down = arrays
    _, pull = jax.vjp(lambda x, w: xla.expert_outputs(x, chosen, w, gate_up, down, activation), x, weights)
    dx, dweights = pull(slope)
    return dx, None, dweights, None, None


_by_triton.defvjp(_forward, _backward)
