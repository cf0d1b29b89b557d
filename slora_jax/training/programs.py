"""The compiled programs of a micro-step: one call per layer forward, one per layer backward.

With `remat`, only the inputs of the layers are kept, and the backward program of a layer computes its activations
again. Without it, the results of its products and of attention are kept too, and only the rest is computed again. One
layer of each kind is compiled for each shape of a micro-step, so compilation does not grow with the model's depth.
Slots, ranks and pages are data: a new adapter compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.experts import expert_outputs
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraTiles
from pallas_kernels.lora.training import HIDDEN, TrainedLora
from pallas_kernels.weight_format import Kernels
from slora_jax.models import ModelConfig, Params, abstract_decoder
from slora_jax.models.decoder import Embedding
from slora_jax.models.init import layer_graph
from slora_jax.models.rotary import Table
from slora_jax.models.traits import Activation, LayerKind
from slora_jax.training.attention import SAVED, packed_attention
from slora_jax.training.losses import Loss

PRODUCT = "product"
"""Name of a projection's output with its adapters, for `jax.checkpoint_policies`."""

LOGIT_ROWS = 256
"""Most rows whose logits exist at one time."""

HYPER = ("active", "clear", "factor", "learning_rate", "b1", "b2", "eps", "weight_decay", "step")
"""Columns of the update's float32 `[slots + 1, 9]`: whether the adapter is updated, whether its gradient is cleared,
the gradient's factor, the settings of `Adam`, and the steps taken before."""


class TrainingContext:
    """The model's access to a layer's adapters and to attention over packed rows (a `models.StepContext`).

    Attributes:
      ledger: see `TrainedLora`.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: LoraLayout,
        segments: jax.Array,
        lora: TrainedLora | None = None,
        pool: Any = None,
        ledger: Any = None,
    ) -> None:
        self._model, self._segments, self._lora, self._pool = model, segments, lora, pool
        self._stacks = {stack.name: stack for stack in layout.stacks}
        self.ledger = ledger

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        """Causal attention within each sequence of each row."""
        rows, length = self._segments.shape
        q, k, v = (part.reshape(rows, length, *part.shape[1:]) for part in (q, k, v))
        mixed = packed_attention(q, k, v, self._segments, window, self._model.score_cap)
        return mixed.reshape(rows * length, *mixed.shape[2:])

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds the LoRA product of a stack to `y`."""
        if self._lora is None:
            return y
        with jax.named_scope("lora"):
            y, self.ledger = self._lora(x, y, self._pool, self.ledger, self._stacks[stack])
        return y if stack == "down" else checkpoint_name(y, PRODUCT)  # that of "down" is only added

    def lookup(self, embedding: Embedding, tokens: jax.Array) -> jax.Array:
        return embedding(tokens)

    def experts(
        self,
        layer: int,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        gate_up: Kernels,
        down: Kernels,
        activation: Activation,
    ) -> jax.Array:
        return expert_outputs(x, chosen, weights, gate_up, down, activation=activation)

    def reduce(self, y: jax.Array) -> jax.Array:
        return y


class TrainingPrograms:
    """The jitted programs of one model. `scale` is float32 `[num_pages, 2, page_size, 1]`: a row's LoRA scale if it
    belongs to B, else 1."""

    def __init__(self, model: ModelConfig, layout: LoraLayout, params: Params, max_rank: int, remat: bool) -> None:
        self._model, self._layout, self._max_rank, self._remat = model, layout, max_rank, remat
        self.dtype = params["embed"]["embedding"].dtype
        self._ends_graph = abstract_decoder(replace(model, num_layers=0), self.dtype)[0]
        self.prepare = jax.jit(self._prepare, static_argnames="tile_rows")
        self.begin = jax.jit(self._begin)
        self.layer = jax.jit(self._layer, static_argnames=("kind", "backward"))
        self.layer_gradient = jax.jit(_layer_gradient, donate_argnames=("gradient", "dx"))
        self.head = jax.jit(self._head, static_argnames=("loss", "backward"))
        self.page_norms = jax.jit(_page_norms)
        self.update = jax.jit(_update, donate_argnames=("master", "mu", "nu", "gradient"))

    def _prepare(self, table: AdapterTable, tiles: LoraTiles, tile_rows: int) -> TrainedLora:
        return TrainedLora(
            self._layout, table, tiles, dtype=self.dtype, tile_rows=tile_rows, max_rank=self._max_rank
        )  # fmt: skip

    def _begin(
        self, ends: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, tuple[Table, ...]]:
        """Returns the first layer's input `[T, d]`, and cosines and sines of each of the model's `ropes`."""
        context = TrainingContext(self._model, self._layout, segments)
        return nnx.merge(self._ends_graph, ends).begin(tokens, positions, context)

    def _layer(
        self,
        params: Params,
        master: jax.Array,
        scale: jax.Array,
        x: jax.Array,
        rotary: tuple[Table, ...],
        segments: jax.Array,
        lora: TrainedLora,
        kind: LayerKind,
        backward: bool,
    ) -> tuple[jax.Array, Any]:
        """Returns the output `[T, d]` of a layer of this kind, and with `backward` the first argument of
        `layer_gradient`."""

        def layer(x: jax.Array, ledger: jax.Array) -> tuple[jax.Array, jax.Array]:
            pool = jax.lax.stop_gradient((ledger * scale).astype(x.dtype))
            context = TrainingContext(self._model, self._layout, segments, lora, pool, ledger)
            graph = layer_graph(self._model, kind, self.dtype)
            return nnx.merge(graph, params)(x, rotary, context), context.ledger

        if not backward:
            return layer(x, master)[0], None
        policies = jax.checkpoint_policies
        kept = policies.nothing_saveable if self._remat else policies.save_only_these_names(PRODUCT, HIDDEN, SAVED)
        (x, _), gradient = jax.vjp(jax.checkpoint(layer, policy=kept), x, master)
        return x, gradient

    def _head(
        self,
        ends: Params,
        x: jax.Array,
        targets: jax.Array,
        inputs: Mapping[str, jax.Array],
        loss: Loss,
        backward: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns each token's loss and its target's log-probability, float32 `[T]`, and the gradient of the last
        layer's output `x [T, d]`, `LOGIT_ROWS` rows at a time."""
        decoder = nnx.merge(self._ends_graph, ends)

        def losses(x: jax.Array, targets: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
            logits = decoder.logits(decoder.end(x))  # [rows, vocab]
            chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
            logprobs = chosen - jax.nn.logsumexp(logits, 1)
            token_loss = loss(logprobs, inputs).astype(jnp.float32)
            return token_loss.sum(), (token_loss, logprobs)

        def chunk(part: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            if not backward:
                return *losses(*part)[1], None
            dx, (token_loss, logprobs) = jax.grad(losses, has_aux=True)(*part)
            return token_loss, logprobs, dx

        rows = math.gcd(LOGIT_ROWS, x.shape[0])
        parts = jax.tree.map(lambda a: a.reshape(-1, rows, *a.shape[1:]), (x, targets, dict(inputs)))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.lax.map(chunk, parts))


def _layer_gradient(backward: Any, dx: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient of the layer's input, and `gradient` plus that of its adapters, with B's relative to B times
    its scale. `backward` is a result of `layer`, and `dx` the gradient of the layer's output."""
    return backward((dx, gradient))


def _page_norms(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """The sum of squares of each page of a layer's gradient, relative to the weights themselves: float32 `[pages]`."""
    return jnp.square(gradient * scale).sum((1, 2, 3))


def _update(
    master: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    gradient: jax.Array,
    scale: jax.Array,
    page_slot: jax.Array,
    hyper: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of `optax.adamw` in a layer, page by page.

    Args:
      page_slot: int32 `[num_pages]`, the slot of each page's adapter; the last row of `hyper` for free pages.
      hyper: float32, see `HYPER`.

    Returns:
      Weights, moments and gradient, all donated.
    """

    def page(weights: Any, mu: Any, nu: Any, gradient: Any, settings: jax.Array) -> tuple[jax.Array, ...]:
        one = dict(zip(HYPER, settings, strict=True))
        adam = optax.adamw(one["learning_rate"], one["b1"], one["b2"], one["eps"], weight_decay=one["weight_decay"])
        state = optax.tree_utils.tree_set(adam.init(weights), mu=mu, nu=nu, count=one["step"].astype(jnp.int32))
        updates, state = adam.update(gradient * one["factor"], state, weights)
        new = (
            optax.apply_updates(weights, updates),
            optax.tree_utils.tree_get(state, "mu"),
            optax.tree_utils.tree_get(state, "nu"),
        )
        kept = (jnp.where(one["active"] > 0, a, b) for a, b in zip(new, (weights, mu, nu), strict=True))
        return tuple(kept)

    new_master, new_mu, new_nu = jax.vmap(page)(master, mu, nu, gradient * scale, hyper[page_slot])
    cleared = hyper[page_slot, HYPER.index("clear")][:, None, None, None] > 0
    return new_master, new_mu, new_nu, jnp.where(cleared, 0.0, gradient)
