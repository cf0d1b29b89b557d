"""The trainer of a server: its sizes, and a first run of its programs."""

from __future__ import annotations

import numpy as np

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters import LoraConfig
from slora_jax.engine import Engine
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.errors import ConfigError
from slora_jax.phases import phase
from slora_jax.serving.settings import TrainSettings
from slora_jax.training import Example, Trainer, TrainerConfig


def make_trainer(engine: Engine, settings: TrainSettings) -> Trainer:
    """Creates a trainer over the engine's weights, and compiles its programs.

    Raises:
      ConfigError: the settings do not fit the engine.
    """
    if engine.config.lora == "off":
        raise ConfigError("EngineConfig.lora='off': training needs an engine that serves adapters; use 'paged'")
    for field, value, most in (
        ("max_lora_rank", settings.max_lora_rank, engine.config.max_lora_rank),
        ("lengths", max(settings.lengths), engine.max_model_len),
    ):
        if value > most:
            limit = "max_lora_rank" if field == "max_lora_rank" else "max_model_len"
            raise ConfigError(f"train.{field}={value}: must be at most the engine's {limit}, {most}; lower it")
    trainer = Trainer.of_engine(engine, trainer_config(engine, settings))
    with phase("trainer"):
        _run_once(trainer)
    return trainer


def trainer_config(engine: Engine, settings: TrainSettings) -> TrainerConfig:
    """Returns the trainer's sizes."""
    layout = adapter_geometry(engine.model, engine.config.page_size).layout
    pages = int(layout.num_pages(np.full(len(PROJECTIONS), settings.max_lora_rank, np.int32)))
    return TrainerConfig(
        num_pages=settings.num_pages or 1 + settings.max_adapters * pages,
        max_adapters=settings.max_adapters,
        max_lora_rank=settings.max_lora_rank,
        lengths=settings.lengths,
        tokens=settings.tokens,
        page_size=engine.config.page_size,
    )


def _run_once(trainer: Trainer) -> None:
    """Runs every program once with the loss cross_entropy. Other losses compile a small program when first used."""
    name, config = "warm-up", trainer.config
    trainer.add(name, LoraConfig(r=1, target_modules="all-linear"))
    for length in config.lengths:
        tokens = np.zeros(length, np.int32)
        row = Example(tokens, tokens, np.zeros(length, np.float32))
        for rows in config.num_rows(length):
            trainer.forward({name: [row] * rows})
            trainer.forward_backward({name: [row] * rows})
    trainer.optim_step([name])
    trainer.remove(name)
