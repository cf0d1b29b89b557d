"""A model on the devices that the settings name; of several processes, each one's part of it."""

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
from slora_jax.engine.step import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, Params, load_model
from slora_jax.models.shards import shard_params
from slora_jax.parallel.mesh import tensor_parallel


class Processes(Protocol):
    """The part that the engine uses of several processes that serve one model (`distributed.group.ProcessGroup`)."""

    def agree(self, settings: Mapping[str, Any], num_pages: int, is_given: bool) -> int:
        """Compares settings with the other processes; returns the number of pages that all take."""

    def device(self, spec: StepSpec, params: Params, config: EngineConfig) -> Device:
        """The device of process 0, whose calls the others make too."""


_SETTINGS_OF_ALL = (
    *(
        "dtype",
        "adapter_pages",
        "page_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "adapter_slots",
    ),
    *("max_lora_rank", "decode_buckets", "mixed_buckets", "kernels", "tensor_parallel_size", "tp_lora", "lora"),
)
"""Settings that the pool and the step programs depend on."""


def load(model_dir: str | Path, config: EngineConfig) -> tuple[ModelConfig, nnx.GraphDef, Params]:
    """Loads a Hugging Face directory or GGUF file on the devices of `config`; of several processes, each one the part
    that its own devices hold.

    Raises:
      ConfigError: there are not enough devices, or the model cannot be cut over them.
      UnsupportedModelError, CheckpointError: see `models.load_model`.
    """
    model = ModelConfig.from_directory(model_dir)
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
    """Returns the step programs' spec, and the parameters on their devices; the same in several processes.

    Raises:
      ConfigError: settings, model and devices do not fit together, or differ between processes.
    """
    parallel = tensor_parallel(model, config.tensor_parallel_size, config.tp_lora, config.tp_first_device)
    if (processes is None) != (parallel is None or jax.process_count() == 1):
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size={config.tensor_parallel_size}, processes={processes}: "
            f"{jax.process_count()} processes run; several serve one model over all of their devices, and are given "
            "what join_processes returned"
        )
    if parallel is not None:
        graphdef, params = shard_params(model, params, parallel)
    if processes is not None:
        settings = {f"EngineConfig.{name}": getattr(config, name) for name in _SETTINGS_OF_ALL}
        settings |= {f"the model's {name}": value for name, value in asdict(model).items()}
        pages = config.num_pages or pages_that_fit(model, config)
        config = replace(config, num_pages=processes.agree(settings, pages, is_given=config.num_pages is not None))
    struct = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if parallel is None else x.sharding), params
    )
    return step_spec(model, graphdef, struct, config, pool_shape(model, config), parallel), params
