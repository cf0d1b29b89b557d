"""vLLM-packed, the paper's strongest baseline, in this engine: a replica of the base model per adapter, merged into its
weights, and the device's memory divided among them.

The paper starts m servers, each with `0.92 / m` of the memory, which share the device by NVIDIA's MPS. Here m engines
are stepped in turn by one process: each step is dispatched while the others' are under way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.lora.layout import ceil_div
from slora_jax import ConfigError, Delta, Engine, EngineConfig, EngineStats, RequestError, SamplingParams, SloraError
from slora_jax.adapters import BaseGeometry, LoraAdapter
from slora_jax.engine.sizing import adapter_geometry, longest_sequence, pool_shape
from slora_jax.metrics import PAGE_KINDS, PoolPages
from slora_jax.models import ModelConfig, Params, abstract_decoder


class OutOfMemory(SloraError):
    """The replicas' weights leave no room for a request: "OOM" in the paper's tables."""


class Packed:
    """m engines, one per adapter, with the methods of an engine that `serve` calls. Requests for the base model have a
    replica if `adapters` has the key None. Weights that no adapter changes are one array but count m times, as each of
    the paper's servers loads its own."""

    def __init__(
        self,
        model: ModelConfig,
        graphdef: nnx.GraphDef,
        params: Params,
        adapters: Mapping[str | None, LoraAdapter | None],
        config: EngineConfig,
    ) -> None:
        """Starts the engines. config: of the one engine whose memory is divided: its weights and its `num_pages`.

        Raises:
          OutOfMemory: a replica's share does not hold its weights and one request of `max_model_len` tokens.
          ConfigError: as `Engine`, there is no adapter, or the weights are quantised.
        """
        if model.weights is not None:
            raise ConfigError(f"packed: weights={model.weights!r}: adapters cannot be merged into quantised weights")
        if not adapters:
            raise ConfigError("packed: adapters={}: there must be one at least, each has a replica")
        num_pages = pages_per_replica(model, config, len(adapters))
        config = replace(config, num_pages=num_pages, lora="off", adapter_pages=None)
        geometry = adapter_geometry(model, config.page_size)
        self._arrivals = itertools.count()
        self._replica_of: dict[str, str | None] = {}  # unfinished requests
        self.replicas: dict[str | None, Engine] = {}
        for name, adapter in tqdm(adapters.items(), desc="starting replicas", disable=not config.progress):
            weights = params if adapter is None else merged(params, adapter, geometry)
            self.replicas[name] = Engine(model, graphdef, weights, replace(config, progress=False))

    def add_request(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        adapter: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queues a request at its adapter's replica.

        Raises:
          RequestError: as `Engine.add_request`; or the adapter has no replica, or another replica uses the id.
        """
        if adapter not in self.replicas:
            raise RequestError(f"adapter={adapter!r} has no replica; there are {', '.join(map(repr, self.replicas))}")
        request_id = f"request-{next(self._arrivals)}" if request_id is None else request_id
        if request_id in self._replica_of:
            raise RequestError(f"request_id={request_id!r} is in use by an unfinished request")
        self.replicas[adapter].add_request(prompt, params, None, request_id)
        self._replica_of[request_id] = adapter
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Cancels a request, as `Engine.cancel`."""
        return request_id in self._replica_of and self.replicas[self._replica_of[request_id]].cancel(request_id)

    def has_work(self) -> bool:
        """Returns whether any replica has work."""
        return any(engine.has_work() for engine in self.replicas.values())

    def step(self) -> list[Delta]:
        """Runs a step of every replica that has work."""
        deltas = []
        for name, engine in self.replicas.items():
            for delta in engine.step() if engine.has_work() else ():
                if delta.output is not None:
                    del self._replica_of[delta.request_id]
                    delta = replace(delta, output=replace(delta.output, adapter=name))
                deltas.append(delta)
        return deltas

    def stats(self) -> EngineStats:
        """Returns the counters summed over the replicas."""
        all_stats = [engine.stats() for engine in self.replicas.values()]
        pages = [vars(stats.pages) for stats in all_stats]
        summed = {
            name: sum(getattr(stats, name) for stats in all_stats) for name in vars(all_stats[0]) if name != "pages"
        }
        return EngineStats(**summed, pages=PoolPages(**{kind: sum(one[kind] for one in pages) for kind in PAGE_KINDS}))

    def close(self) -> None:
        for engine in self.replicas.values():
            engine.close()


def pages_per_replica(model: ModelConfig, config: EngineConfig, replicas: int) -> int:
    """Returns the pages of each replica's pool: `(total - m weights) / m / page`. The total is the memory of one engine
    with `config`: its weights and its `num_pages`.

    Raises:
      OutOfMemory: they do not hold one request of `max_model_len` tokens.
    """
    shape = pool_shape(model, config)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_decoder(model, config.dtype)[1]))
    total = weights + shape.num_pages * shape.page_bytes
    pages = (total - replicas * weights) // replicas // shape.page_bytes
    longest = longest_sequence(model, config)
    needed = 1 + ceil_div(longest, config.page_size)  # the dummy page
    if pages < needed:
        raise OutOfMemory(
            f"out of memory: {replicas} replicas of {_gib(weights)} of weights in {_gib(total)} leave each "
            f"{max(0, pages)} pages of {config.page_size} tokens, and a request of max_model_len={longest} tokens "
            f"needs {needed}; serve fewer adapters, or raise num_pages"
        )
    return pages


def merged(params: Params, adapter: LoraAdapter, geometry: BaseGeometry) -> Params:
    """Returns parameters with the adapter added to their kernels, in float32 before the cast; the others are shared."""
    layers = {}
    for index, layer in params["layers"].items():
        layers[index] = dict(layer)
        for stack in geometry.layout.stacks:
            kernel = np.array(layer[stack.name]["kernel"], np.float32)  # [d_in, d_out]
            for projection, column, width in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
                key = (index, projection)
                if key in adapter.a:
                    delta = np.float32(adapter.scales[key]) * (adapter.b[key] @ adapter.a[key])  # [d_out, d_in]
                    kernel[:, column : column + width] += delta.T
            dtype = layer[stack.name]["kernel"].dtype
            layers[index][stack.name] = layer[stack.name] | {"kernel": jnp.asarray(kernel, dtype)}
    return params | {"layers": layers}


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
