"""Loads a model onto the devices of the settings. With several processes, each loads its own part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx

from slora_jax.engine.config import EngineConfig
from slora_jax.engine.device import Device
from slora_jax.engine.sizing import pages_that_fit, pool_shape, step_spec
from slora_jax.engine.step_spec import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, Params, load_model
from slora_jax.models.shards import shard_params
from slora_jax.parallel.mesh import tensor_parallel


class Processes(Protocol):
    """The interface of `distributed.group.ProcessGroup` that the engine uses."""

    def agree(self, settings: Mapping[str, Any], num_pages: int, is_given: bool) -> int:
        """Checks that all processes have the same settings. Returns the number of pages for all."""

    def device(self, spec: StepSpec, params: Params, config: EngineConfig) -> Device:
        """Makes the device of process 0, whose calls the followers repeat."""


_SHARED_SETTINGS = (
    *(
        "dtype",
        "kv_dtype",
        "adapter_pages",
        "page_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "adapter_slots",
    ),
    *("max_lora_rank", "decode_buckets", "mixed_buckets", "kernels", "tensor_parallel_size", "tp_lora", "lora"),
)
"""Settings of the pool and the step programs, which must be equal in all processes."""


def load(model_dir: str | Path, config: EngineConfig) -> tuple[ModelConfig, nnx.GraphDef, Params]:
    """Loads a Hugging Face directory or GGUF file onto this process's devices.

    Raises:
      ConfigError: there are too few devices, or the model cannot be sharded over them.
      UnsupportedModelError, CheckpointError: see `models.load_model`.
    """
    model = config.of_model(ModelConfig.from_directory(model_dir).up_to(config.max_model_len))
    parallel = tensor_parallel(model, config.tensor_parallel_size, config.tp_lora, config.tp_first_device)
    graphdef, params, model = load_model(
        model_dir, config.dtype, config.model_cache_dir, config.progress, parallel, config=model
    )
    return model, graphdef, params


def place(
    model: ModelConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    config: EngineConfig,
    processes: Processes | None = None,
) -> tuple[StepSpec, Params]:
    """Returns the spec of the step programs, and the parameters on their devices.

    Raises:
      ConfigError: settings, model and devices do not fit together, or differ between processes.
    """
    if processes is not None and config.adapter_extras:
        raise ConfigError(
            "EngineConfig.adapter_extras=True: must be False over several processes, because such an adapter is read "
            "against weights of which each process has a part; use one process for all devices"
        )
    parallel = tensor_parallel(model, config.tensor_parallel_size, config.tp_lora, config.tp_first_device)
    if (processes is None) != (parallel is None or jax.process_count() == 1):
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size={config.tensor_parallel_size}, processes={processes}: "
            f"JAX runs {jax.process_count()} processes; processes must be the result of join_processes if several "
            "share the model, and None otherwise"
        )
    if parallel is not None:
        graphdef, params = shard_params(model, params, parallel)
    if processes is not None:
        settings = {f"EngineConfig.{name}": getattr(config, name) for name in _SHARED_SETTINGS}
        settings |= {f"the model's {name}": value for name, value in asdict(model).items()}
        pages = config.num_pages or pages_that_fit(model, config)
        config = replace(config, num_pages=processes.agree(settings, pages, is_given=config.num_pages is not None))
    struct = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if parallel is None else x.sharding), params
    )
    return step_spec(model, graphdef, struct, config, pool_shape(model, config), parallel), params
