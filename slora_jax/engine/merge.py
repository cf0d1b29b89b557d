"""The merge baseline: the one adapter that is served lies in the base weights (paper section 5.2 and figure 9).

`W += A B` when a step's requests need another adapter than the one that is merged, `W -= A B` of that one before. The
steps themselves have no LoRA. Sums are made in float32 and rounded to the weights' dtype, so taking an adapter out does
not restore the weights to the bit: each switch leaves up to half a unit in the last place of `W + A B` behind. The
paper's code does the same. In float32 that is far below what changes a token; in bfloat16 it adds up: after 100
switches the weights are off by about 2% (`tests/engine/test_lora_baselines.py` measures it).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora import AdapterTable, LoraLayout, Stack, xla
from pallas_kernels.lora.layout import ceil_div
from slora_jax.engine.step import StepSpec
from slora_jax.memory import Pool, Resident
from slora_jax.metrics import Counters
from slora_jax.models import Params
from slora_jax.scheduling import StepPlan


class MergeDevice(Protocol):
    """The part of a device that `AdapterMerge` uses."""

    def merge(self, slot: int, sign: float) -> None:
        """Adds `sign` times the adapter in `slot` to the weights."""


Kernels = tuple[dict[str, jax.Array], ...]
"""By layer, the kernel `[d_in, d_out]` of each stack, by its name."""


class AdapterMerge:
    """Tracks which adapter is in the weights, and has the device change it.

    An adapter that is merged may be evicted from the pool as soon as no request uses it; its pages are read for the
    last time before anything is written there. So `before_upload` and `before_step` must be called in time.
    """

    def __init__(self, device: MergeDevice, counters: Counters) -> None:
        self._device, self._counters = device, counters
        self._merged: Resident | None = None
        self._residents: dict[int, Resident] = {}  # by slot: the newest there

    def before_upload(self, resident: Resident) -> None:
        """`resident` is about to be written to its pages and slot."""
        merged = self._merged
        if merged is not None and merged.digest == resident.digest:
            self._merged = resident  # evicted while it was merged, and wanted again
        elif merged is not None and (resident.slot == merged.slot or np.intersect1d(resident.pages, merged.pages).size):
            self._unmerge()
        self._residents[resident.slot] = resident

    def before_step(self, plan: StepPlan) -> None:
        """The step of `plan` follows, whose requests are of one adapter, or all of none."""
        wanted = {s.request.adapter_slot for s in plan.sequences}
        assert len(wanted) == 1, f"lora='merge': a step of several adapters' requests, slots {sorted(wanted)}"
        slot = wanted.pop()
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
        """The parameters with `sign` times the adapter in `slot`; the given ones are donated."""
        merged = self.program(kernels(params), pool, table, np.int32(slot), np.float32(sign))
        layers = {
            index: layer | {name: layer[name] | {"kernel": kernel} for name, kernel in merged[index].items()}
            for index, layer in params["layers"].items()
        }
        return params | {"layers": layers}


def kernels(params: Params) -> Kernels:
    """The weights that adapters change."""
    layers = params["layers"]
    return tuple({s: layers[i][s]["kernel"] for s in ("qkv", "o", "gate_up", "down")} for i in range(len(layers)))


def make_merge(spec: StepSpec) -> Any:
    """The jitted `(kernels, pool, table, slot int32, sign float32) -> kernels`: adds `sign` times the product of the
    adapter in `slot` to every kernel, in place (kernels are donated)."""
    layout = spec.lora_layout

    def merge(weights: Kernels, pool: Pool, table: AdapterTable, slot: jax.Array, sign: jax.Array) -> Kernels:
        rows = xla.prepare(layout, table.pages, table.ranks, slot[None], jnp.int32(1), spec.max_rank)
        return tuple(
            {
                stack.name: _added(layer[stack.name], pool[index], stack, layout, rows[number], sign)
                for number, stack in enumerate(layout.stacks)
            }
            for index, layer in enumerate(weights)
        )

    return jax.jit(merge, donate_argnums=0)


def _added(
    kernel: jax.Array, layer: jax.Array, stack: Stack, layout: LoraLayout, rows: xla.StackRows, sign: jax.Array
) -> jax.Array:
    """`kernel [d_in, d_out] + sign A B` of one stack, from the layer's pool."""
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
