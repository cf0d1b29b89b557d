"""Padded stacks of adapters in JAX, as in SkyRL tx: A `[adapters, in, max_rank]`, B likewise, rows sorted by adapter.

It has our decoder, attention and head. A layer's activations are kept for its backward pass. A stack's A are joined:
one product for q, k and v, and one for gate and up. As every adapter has the same number of tokens, the products are
batched ones; `ragged_dot`, which SkyRL tx uses, is the other form. A micro-step has whole adapters only, so that their
optimizer follows at once, on their part of the stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.training_bench.settings import BETAS, EPS, LEARNING_RATE, MICRO_TOKENS, RANKS, Cell, sequences
from slora_jax.adapters import read_peft
from slora_jax.models.init import layer_graph
from slora_jax.training import LOSSES, Trainer, TrainerConfig
from slora_jax.training.programs import TrainingContext

RANK = max(RANKS)


class System:
    """The adapters `paths`, stacked."""

    def __init__(self, model_dir: str, paths: Sequence[str], cell: Cell, product: str) -> None:
        self._cell, self._product = cell, product
        config = TrainerConfig(num_pages=2, max_adapters=1, lengths=(cell.length,), tokens=(1,), dtype="float32")
        self._trainer = Trainer.from_pretrained(model_dir, config)
        self._group = max(1, min(cell.adapters, MICRO_TOKENS // (cell.sequences * cell.length)))
        adapters = [read_peft(path, self._trainer.geometry) for path in paths]
        self._scales = jnp.asarray([adapter.config.lora_alpha / adapter.config.r for adapter in adapters], jnp.float32)
        layers = range(self._trainer.model.num_layers)
        self._stacks = [self._stack(adapters, layer) for layer in layers]
        self._adam = optax.adamw(LEARNING_RATE, *BETAS, EPS, weight_decay=0.0)
        self._states = [jax.vmap(self._adam.init)(stacks) for stacks in self._stacks]
        self._forward, self._backward = jax.jit(self._layer), jax.jit(lambda back, dy: back(dy))
        self._take = jax.jit(self._slice)
        self._update = jax.jit(self._optimizer, donate_argnums=(0, 1))

    def step(self, number: int, adapters: int) -> list[float]:
        """Forward, backward and optimizer of the first `adapters` adapters. Returns each one's loss, a sum."""
        losses = [
            self._micro_step(number, first, min(self._group, adapters)) for first in range(0, adapters, self._group)
        ]
        jax.block_until_ready(self._stacks)
        return [float(loss) for part in losses for loss in np.asarray(part)]

    def _stack(self, adapters: Sequence[Any], layer: int) -> dict[str, Any]:
        """A layer's matrices by stack: A `[adapters, in, projections * RANK]`, B `[adapters, RANK, out]` each."""
        stacks = {}
        for stack in self._trainer.geometry.layout.stacks:
            a, b = [], []
            for name in stack.projections:
                pads = [RANK - adapter.a[layer, name].shape[0] for adapter in adapters]
                a.append([np.pad(x.a[layer, name], ((0, n), (0, 0))).T for x, n in zip(adapters, pads, strict=True)])
                b.append([np.pad(x.b[layer, name].T, ((0, n), (0, 0))) for x, n in zip(adapters, pads, strict=True)])
            joined = np.concatenate([np.stack(part) for part in a], axis=2)
            stacks[stack.name] = {"a": jnp.asarray(joined), "b": [jnp.asarray(np.stack(part)) for part in b]}
        return stacks

    def _micro_step(self, number: int, first: int, count: int) -> jax.Array:
        programs, params, cell = self._trainer.programs, self._trainer.params["layers"], self._cell
        vocab = self._trainer.model.vocab_size
        ids = np.concatenate([sequences(cell, i, number, vocab) for i in range(first, first + count)])
        tokens, targets = ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1)
        positions = np.tile(np.arange(cell.length, dtype=np.int32), len(ids))
        segments = jnp.ones((len(ids), cell.length), jnp.int32)
        ends = {name: leaf for name, leaf in self._trainer.params.items() if name != "layers"}
        x, rotary = programs.begin(ends, tokens, positions, segments)
        scales = self._scales[first : first + count]
        parts = [self._take(stacks, np.arange(first, first + count)) for stacks in self._stacks]
        backs = []
        for layer, part in enumerate(parts):
            x, back = self._forward(params[layer], part, x, rotary, segments, scales)
            backs.append(back)
        inputs = {"weights": np.ones(len(tokens), np.float32)}
        token_loss, _, dx = programs.head(
            ends, x, targets, inputs, loss=LOSSES["cross_entropy"][0], backward=True
        )  # fmt: skip
        for layer in reversed(range(len(parts))):
            gradient, dx = self._backward(backs.pop(), dx)
            self._stacks[layer], self._states[layer] = self._update(
                self._stacks[layer], self._states[layer], gradient, np.arange(first, first + count)
            )
        return token_loss.reshape(count, -1).sum(1)

    def _layer(self, params: Any, stacks: Any, x: Any, rotary: Any, segments: Any, scales: Any) -> Any:
        """Returns the layer's output and its backward pass, with the activations that it needs."""
        programs, model, geometry = self._trainer.programs, self._trainer.model, self._trainer.geometry

        def layer(stacks: Any, x: jax.Array) -> jax.Array:
            context = _Context(model, geometry.layout, segments)
            context.adapters, context.scales, context.product = stacks, scales, self._product
            graph = layer_graph(model, model.kind(0), programs.dtype)
            return nnx.merge(graph, params)(x, rotary, context)

        return jax.vjp(layer, stacks, x)

    def _slice(self, tree: Any, members: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[members], tree)

    def _optimizer(self, stacks: Any, states: Any, gradient: Any, members: jax.Array) -> Any:
        """AdamW of some members of the stacks, each with its own count of steps."""
        own, state = self._slice((stacks, states), members)
        updates, state = jax.vmap(self._adam.update)(gradient, state, own)
        new = optax.apply_updates(own, updates), state
        return jax.tree.map(lambda leaf, part: leaf.at[members].set(part), (stacks, states), new)


class _Context(TrainingContext):
    """The products of padded stacks."""

    adapters: Any
    scales: jax.Array
    product: str

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds the LoRA products of a stack to `y`."""
        a, b, count = self.adapters[stack]["a"], self.adapters[stack]["b"], len(self.scales)
        multiply = partial(_ragged if self.product == "ragged_dot" else _batched, count)
        scale = jnp.repeat(self.scales, x.shape[0] // count)[:, None]
        hidden = multiply(x, a) * scale
        return y + jnp.concatenate([multiply(hidden[:, i * RANK : (i + 1) * RANK], one) for i, one in enumerate(b)], 1)


def _batched(count: int, x: jax.Array, weights: jax.Array) -> jax.Array:
    return (x.reshape(count, -1, x.shape[1]) @ weights).reshape(x.shape[0], -1)


def _ragged(count: int, x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, weights, jnp.full(count, x.shape[0] // count, jnp.int32))
