"""The merge baseline: serves one adapter at a time by merging it into the base weights (paper section 5.2, figure 9).

When a step needs another adapter, the merged one is subtracted (`W -= A B`) and the new one added (`W += A B`). Steps
run without LoRA. Sums are computed in float32 and rounded to the weights' dtype, so each switch leaves an error of up
to half a unit in the last place of `W + A B`, as in the paper's code. In float32 the error is far too small to change a
token. In bfloat16 it accumulates: after 100 switches the weights are off by about 2% (measured in
`tests/engine/test_lora_baselines.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_format import pages_of
from pallas_kernels.lora import AdapterTable, LoraLayout, Stack, xla
from pallas_kernels.lora.layout import ceil_div
from slora_jax.engine.step_spec import StepSpec
from slora_jax.memory import Pool, Resident
from slora_jax.metrics import Counters
from slora_jax.models import Params
from slora_jax.scheduling import StepPlan


class MergeDevice(Protocol):
    """The interface of `Device` that `AdapterMerge` uses."""

    def merge(self, slot: int, sign: float) -> None:
        """Adds `sign` times the adapter in `slot` to the weights."""


Kernels = tuple[dict[str, jax.Array], ...]
"""One dictionary per layer, from stack name to kernel `[d_in, d_out]`."""


class AdapterMerge:
    """Tracks the merged adapter and switches it on the device.

    The merged adapter may be evicted from the pool, but its pages are needed to subtract it. `before_upload` subtracts
    it before its pages are overwritten.
    """

    def __init__(self, device: MergeDevice, counters: Counters) -> None:
        self._device, self._counters = device, counters
        self._merged: Resident | None = None
        self._residents: dict[int, Resident] = {}  # newest resident by slot

    def before_upload(self, resident: Resident) -> None:
        """Must be called before `resident` is written to its pages and slot."""
        merged = self._merged
        if merged is not None and merged.digest == resident.digest:
            self._merged = resident  # evicted while merged, and uploaded again
        elif merged is not None and (resident.slot == merged.slot or np.intersect1d(resident.pages, merged.pages).size):
            self._unmerge()
        self._residents[resident.slot] = resident

    def before_step(self, plan: StepPlan) -> None:
        """Merges the adapter of the plan's requests, which must all have the same one, or none."""
        slots = {s.request.adapter_slot for s in plan.sequences}
        assert len(slots) == 1, f"lora='merge': a step has requests for several adapters, slots {sorted(slots)}"
        slot = slots.pop()
        resident = None if slot < 0 else self._residents[slot]
        if resident is self._merged:
            return
        if self._merged is not None:
            self._unmerge()
        if resident is not None:
            self._device.merge(resident.slot, 1.0)
            self._merged = resident
            self._counters.adapter_merges += 1

    def _unmerge(self) -> None:
        assert self._merged is not None
        self._device.merge(self._merged.slot, -1.0)
        self._merged = None


class MergeProgram:
    """The program that merges an adapter, compiled once."""

    def __init__(self, spec: StepSpec) -> None:
        number = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        shapes = kernels(spec.params), spec.pool.pool_struct(), spec.pool.table_struct(), *number
        self.program = make_merge(spec).lower(*shapes).compile()

    def __call__(self, params: Params, pool: Pool, table: AdapterTable, slot: int, sign: float) -> Params:
        """Returns the parameters plus `sign` times the adapter in `slot`. `params` are donated."""
        merged = self.program(kernels(params), pool, table, np.int32(slot), np.float32(sign))
        layers = {
            index: layer | {name: layer[name] | {"kernel": kernel} for name, kernel in merged[index].items()}
            for index, layer in params["layers"].items()
        }
        return params | {"layers": layers}


def kernels(params: Params) -> Kernels:
    """Returns the kernels that adapters modify."""
    layers = params["layers"]
    return tuple({s: layers[i][s]["kernel"] for s in ("qkv", "o", "gate_up", "down")} for i in range(len(layers)))


def make_merge(spec: StepSpec) -> Any:
    """Returns the jitted `(kernels, pool, table, slot int32, sign float32) -> kernels`.

    It adds `sign` times the product of the adapter in `slot` to every kernel, in place (kernels are donated).
    """
    layout = spec.lora_layout

    def merge(weights: Kernels, pool: Pool, table: AdapterTable, slot: jax.Array, sign: jax.Array) -> Kernels:
        rows = xla.prepare(layout, table.pages, table.ranks, slot[None], jnp.int32(1), spec.max_rank)
        return tuple(
            {
                stack.name: _added(layer[stack.name], pages_of(pool[index]), stack, layout, rows[number], sign)
                for number, stack in enumerate(layout.stacks)
            }
            for index, layer in enumerate(weights)
        )

    return jax.jit(merge, donate_argnums=0)


def _added(
    kernel: jax.Array, layer: jax.Array, stack: Stack, layout: LoraLayout, rows: xla.StackRows, sign: jax.Array
) -> jax.Array:
    """Returns `kernel [d_in, d_out] + sign A B` for one stack; `layer` is the layer's pool."""
    flat = layer.reshape(-1, layout.width)
    exact = jax.lax.Precision.HIGHEST if layer.dtype == jnp.float32 else None
    deltas, first = [], 0
    for p, d_out in enumerate(stack.d_outs):
        chunks = ceil_div(d_out, layout.width)
        live = rows.b_live[:, 0, first].reshape(-1, 1)  # [R, 1]
        b_row = jnp.moveaxis(rows.b_row[:, 0, first : first + chunks], 2, 1)  # [G, GROUP, chunks]
        a = flat.at[rows.a_row[:, 0, p]].get(mode="clip").reshape(live.size, -1)[:, : stack.d_in]
        b = flat.at[b_row].get(mode="clip").reshape(live.size, -1)[:, :d_out]
        a, b = jnp.where(live, a, 0), jnp.where(live, b, 0)  # [R, d_in], [R, d_out]
        deltas.append(jnp.einsum("ri,ro->io", a, b, precision=exact, preferred_element_type=jnp.float32))
        first += chunks
    return (kernel.astype(jnp.float32) + sign * jnp.concatenate(deltas, 1)).astype(kernel.dtype)
