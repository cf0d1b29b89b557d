"""The step on a CPU, compiled in parts, with one part for each kind of layer.

A CPU runs a program operation by operation, so one call per layer takes as long as one program of all layers, but only
one layer of each kind is compiled. On a GPU a step is one program (`make_step`), which runs as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
from flax import nnx

from pallas_kernels.kv_format import LayerPool
from pallas_kernels.lora import AdapterTable, LoraTiles
from slora_jax.engine.batch import BatchLayout, SequenceState, StepBatch, unpack
from slora_jax.engine.step import (
    LoraStep,
    PagedContext,
    StepOutput,
    end_work,
    greedy_token,
    lora_work,
    output_specs,
    pooled_states,
    replicated,
    step_name,
    step_shapes,
)
from slora_jax.engine.step_spec import Lora, StepSpec
from slora_jax.memory import Pool
from slora_jax.models import Params, abstract_decoder
from slora_jax.models.init import layer_graph
from slora_jax.models.rotary import Table
from slora_jax.models.traits import LayerKind
from slora_jax.parallel.mesh import POOL, REPLICATED


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepShared:
    """Inputs of all layers of a step. rotary: cosines and sines of each of `ModelConfig.ropes`."""

    batch: StepBatch
    rotary: tuple[Table, ...]


@dataclass(frozen=True)
class Part:
    """A program to compile.

    Attributes:
      name: name of the program, unique within an engine.
      function: the jitted function.
      shapes: returns the `jax.ShapeDtypeStruct`s of its arguments; may trace other parts.
    """

    name: str
    function: Any
    shapes: Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class LayeredProgram:
    """The compiled parts of one step, with the program of each layer. Takes the arguments of `make_step`'s program.

    If adapters change embedding and head, the first and the last part take the adapter table and all layers' pools too.
    """

    begin: Callable[..., Any]
    prepare: Callable[..., Any] | None
    layers: tuple[Callable[..., Any], ...]
    end: Callable[..., Any]
    has_ends: bool

    def __call__(
        self, params: Params, pool: Pool, table: AdapterTable, state: SequenceState, metadata: Any
    ) -> tuple[Pool, SequenceState, StepOutput]:
        ends, layers = _ends(params), list(pool)
        more = (table, pool) if self.has_ends else ()
        page_table, x, shared = self.begin(ends, state.page_table, state.last_token, metadata, *more)
        lora = None if self.prepare is None else self.prepare(table, shared.batch.lora)
        for i, layer in enumerate(self.layers):
            layers[i], x = layer(params["layers"][i], layers[i], x, shared, lora)
        more = (table, tuple(layers)) if self.has_ends else ()
        last_token, output = self.end(ends, state.last_token, x, shared.batch, *more)
        return tuple(layers), SequenceState(page_table, last_token), output


class LayeredStep:
    """The functions of one step's parts and the shapes of their arguments."""

    def __init__(self, spec: StepSpec, layout: BatchLayout, with_lora: Lora) -> None:
        self._spec, self._layout, self._with_lora = spec, layout, with_lora
        self._dtype = spec.params["embed"]["embedding"].dtype
        bucket, name = layout.bucket.name, step_name(layout.bucket, with_lora)
        ends, specs = {}, None
        if spec.parallel is not None:
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, spec.params)
            ends = _ends(specs)
        self._kinds = spec.model.kinds
        self._has_ends = spec.has_ends(with_lora)
        # The ends are the same programs with and without LoRA of the layers.
        outer = step_name(layout.bucket, "extras") if self._has_ends else bucket
        same, output = REPLICATED, output_specs(layout)
        self._parts = {
            "begin": Part(
                f"{outer}_begin",
                self._jit(f"{outer}_begin", self._begin, (1,), (ends, same, same, same), same),
                lambda: self._begin_shapes,
            ),
            "end": Part(
                f"{outer}_end",
                self._jit(f"{outer}_end", self._end, (1,), (ends, same, same, same), (same, output)),
                self._end_shapes,
            ),
        }
        for number, kind in enumerate(dict.fromkeys(self._kinds)):
            first = self._kinds.index(kind)
            layer, own = f"{name}_layer{number or ''}", {} if specs is None else specs["layers"][first]
            in_specs = own, POOL, same, same, same
            self._parts[_role(kind)] = Part(
                layer,
                self._jit(layer, partial(self._layer, kind), (1, 2), in_specs, (POOL, same)),
                partial(self._layer_shapes, first),
            )
        if with_lora:
            self._parts["prepare"] = Part(
                f"{name}_prepare",
                self._jit(f"{name}_prepare", self._prepare, (), same, same),
                self._prepare_shapes,
            )

    @property
    def parts(self) -> list[Part]:
        return list(self._parts.values())

    def program(self, compiled: Mapping[str, Callable[..., Any]]) -> LayeredProgram:
        """Returns the step, given its compiled parts by name."""
        part = {role: compiled[part.name] for role, part in self._parts.items()}
        layers = tuple(part[_role(kind)] for kind in self._kinds)
        return LayeredProgram(part["begin"], part.get("prepare"), layers, part["end"], self._has_ends)

    # The functions

    def _begin(
        self,
        ends: Params,
        page_table: jax.Array,
        last_token: jax.Array,
        metadata: jax.Array,
        table: AdapterTable | None = None,
        pool: Pool = (),
    ) -> tuple[jax.Array, jax.Array, StepShared]:
        """Returns the new page table, the first layer's input `[T, d]`, and the inputs shared by all layers."""
        batch, state = unpack(metadata, SequenceState(page_table, last_token), self._layout)
        decoder = nnx.merge(self._ends_graph, ends)
        x, rotary = decoder.begin(batch.token, batch.position, self._context(pool, batch, None, table))
        return state.page_table, x, StepShared(batch, rotary)

    def _prepare(self, table: AdapterTable, tiles: LoraTiles) -> LoraStep | None:
        return lora_work(self._spec, self._layout, table, tiles, self._with_lora)

    def _layer(
        self,
        kind: LayerKind,
        params: Params,
        pool: LayerPool,
        x: jax.Array,
        shared: StepShared,
        lora: LoraStep | None,
    ) -> tuple[LayerPool, jax.Array]:
        """Returns the pool and output of a layer of this kind. Both inputs are donated."""
        context = self._context((pool,), shared.batch, lora)
        x = nnx.merge(layer_graph(self._spec.shard_model, kind, self._dtype), params)(x, shared.rotary, context)
        return context.pool[0], x

    def _end(
        self,
        ends: Params,
        last_token: jax.Array,
        x: jax.Array,
        batch: StepBatch,
        table: AdapterTable | None = None,
        pool: Pool = (),
    ) -> tuple[jax.Array, StepOutput]:
        """Returns the new last tokens and the step's output."""
        decoder = nnx.merge(self._ends_graph, ends)
        context = None if table is None else self._context(pool, batch, None, table)
        hidden = decoder.end(x)
        logits = decoder.logits(hidden[batch.last_row], context)  # [S, vocab]
        token = greedy_token(self._spec, logits)
        output = StepOutput(token, logits, pooled_states(self._layout, batch, hidden))
        return last_token.at[batch.slot].set(token), output

    def _context(
        self, pool: Pool, batch: StepBatch, lora: LoraStep | None, table: AdapterTable | None = None
    ) -> PagedContext:
        end_rows = None if table is None else end_work(self._spec, table, batch, self._with_lora)
        return PagedContext(pool, batch, lora, self._spec, self._layout, end_rows)

    @cached_property
    def _ends_graph(self) -> nnx.GraphDef:
        """Graph definition of the decoder without its layers."""
        return abstract_decoder(replace(self._spec.shard_model, num_layers=0), self._dtype)[0]

    def _jit(
        self, name: str, function: Callable[..., Any], donated: tuple[int, ...], in_specs: Any, out_specs: Any
    ) -> Any:
        """Jits a part, inside `shard_map` if there are several shards."""
        parallel = self._spec.parallel
        if parallel is not None:
            function = jax.shard_map(
                function, mesh=parallel.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )

        def part(*args: Any) -> Any:
            return function(*args)

        part.__name__ = name
        return jax.jit(part, donate_argnums=donated)

    # The shapes

    @cached_property
    def _shapes(self) -> tuple[Any, ...]:
        return step_shapes(self._spec, self._layout)

    @cached_property
    def _begin_shapes(self) -> tuple[Any, ...]:
        params, pool, table, state, metadata = self._shapes
        more = (table, pool) if self._has_ends else ()
        return _ends(params), state.page_table, state.last_token, metadata, *more

    @cached_property
    def _begun(self) -> tuple[Any, Any, StepShared]:
        return self._results("begin", self._begin_shapes)

    def _prepare_shapes(self) -> tuple[Any, ...]:
        return self._shapes[2], self._begun[2].batch.lora

    def _layer_shapes(self, layer: int) -> tuple[Any, ...]:
        params, pool, *_ = self._shapes
        lora = self._results("prepare", self._prepare_shapes()) if "prepare" in self._parts else None
        return params["layers"][layer], pool[layer], *self._begun[1:], lora

    def _end_shapes(self) -> tuple[Any, ...]:
        params, pool, table, state, _ = self._shapes
        _, x, shared = self._begun
        more = (table, pool) if self._has_ends else ()
        return _ends(params), state.last_token, x, shared.batch, *more

    def _results(self, role: str, shapes: tuple[Any, ...]) -> Any:
        parallel, structs = self._spec.parallel, jax.eval_shape(self._parts[role].function, *shapes)
        return structs if parallel is None else replicated(parallel, structs)


def _role(kind: LayerKind) -> str:
    """The key of the part that runs layers of this kind."""
    return f"layer {kind}"


def _ends(params: Params) -> Params:
    """Returns the parameters outside the layers."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}
