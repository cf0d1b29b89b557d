"""Sizes of the trainer, derived from a recipe and its data: no larger than they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pallas_kernels.lora.layout import ceil_div
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.models.config import ModelConfig
from slora_jax.training.batch import micro_batches, pack
from slora_jax.training.config import TrainerConfig
from slora_jax.training.data import DEFAULT_MAX_LENGTH, Dataset, examples
from slora_jax.training.pool import largest_ranks, trained_targets
from slora_jax.training.recipe import AdapterRecipe, Recipe

_SHORTEST_ROWS = (32, 64, 128, 256, 512)
"""Candidates for the shortest row length. Each further one is four times longer, so that few programs are compiled."""

_QUADRATIC = 4096
"""Row length, in tokens, at which attention costs about as much as the rest of a layer."""

_DIVIDED = 1024
"""Micro-steps of at least so many tokens come in a quarter of the size as well, for an iteration's last rows."""

_MICRO_STEP = 128
"""Cost of a further micro-step, in tokens."""

_SAMPLED_STEPS = 4
"""Optimizer steps of each adapter by which sizes are compared."""


def trainer_config(recipe: Recipe, datasets: Mapping[str, Dataset], model: ModelConfig) -> TrainerConfig:
    """Returns the trainer's sizes. Raises ConfigError if an adapter cannot be attached to the model."""
    ranks = [_ranks(name, adapter, model) for name, adapter in recipe.adapters.items()]
    layout = adapter_geometry(model, TrainerConfig.page_size).layout
    lengths, tokens = packing(recipe, datasets)
    return TrainerConfig(
        num_pages=1 + sum(int(layout.num_pages(one)) for one in ranks),
        max_adapters=len(ranks),
        max_lora_rank=max(int(one.max()) for one in ranks),
        lengths=lengths,
        tokens=tokens,
        dtype=recipe.dtype,
    )


def longest_example(recipe: Recipe, model: ModelConfig) -> int:
    """Returns the tokens of the longest example. Raises ConfigError if the model has fewer positions."""
    positions = model.max_position_embeddings
    if (recipe.max_length or 0) > positions:
        raise ConfigError(f"max_length={recipe.max_length}: the model has {positions} positions; lower it")
    return recipe.max_length or min(DEFAULT_MAX_LENGTH, positions)


def packing(recipe: Recipe, datasets: Mapping[str, Dataset]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chooses the row lengths, and then the tokens of a micro-step, that suit the batches of the first steps best.

    Returns:
      `TrainerConfig.lengths` and `.tokens`.
    """
    sizes = (len(one.ids) - 1 for data in datasets.values() for part in (data.train, data.evaluation) for one in part)
    longest = max(sizes)
    steps = [
        [examples(datasets[name].batch(adapter, step)) for name, adapter in recipe.adapters.items()]
        for step in range(_SAMPLED_STEPS)
    ]
    choices_of_lengths: list[tuple[int, ...]] = [(ceil_div(longest, 16) * 16,)]
    for shortest in _SHORTEST_ROWS:
        lengths = [shortest]
        while lengths[-1] < longest:
            lengths.append(4 * lengths[-1])
        choices_of_lengths.append(tuple(lengths))
    found = []
    for chosen in choices_of_lengths:
        config = TrainerConfig(num_pages=2, lengths=chosen)
        rows = [[row for batch in batches for row in pack(0, batch, config)] for batches in steps]
        cost = sum(row.length * (1 + row.length / _QUADRATIC) for step in rows for row in step)
        found.append((cost, len(chosen), config, rows))
    _, _, config, rows = min(found, key=lambda one: one[:2])
    choices = []
    tokens = config.lengths[-1]
    while tokens <= max(recipe.micro_step_tokens, config.lengths[-1]):
        for sizes_of_step in ((tokens,), (tokens // 4, tokens))[: 2 if tokens >= _DIVIDED else 1]:
            sized = replace(config, tokens=sizes_of_step)
            micro = [one for step in rows for one in micro_batches(step, (), sized)]
            cost = sum(one.num_rows * one.length + _MICRO_STEP for one in micro)
            choices.append((cost, len(sizes_of_step), sizes_of_step))
        tokens *= 2
    return config.lengths, min(choices)[2]


def _ranks(name: str, adapter: AdapterRecipe, model: ModelConfig) -> np.ndarray:
    """Each projection's largest rank over the layers, int32 `[7]`."""
    try:
        targets = trained_targets(adapter.lora, model.num_layers)
    except AdapterError as error:
        raise ConfigError(f"adapters.{name}.lora.{error}") from None
    return largest_ranks(targets)
