"""Sizes of the trainer, derived from a recipe and its data: no larger than they need."""

from __future__ import annotations

from collections.abc import Mapping

from slora_jax.adapters.targets import resolve_targets
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.models.config import ModelConfig
from slora_jax.training.data import DEFAULT_MAX_LENGTH, Dataset
from slora_jax.training.recipe import Recipe

_ROUNDING = 16
"""Row lengths are multiples of this."""

_MOST_LENGTHS = 3
"""Most row lengths, each of which costs a compilation."""

_WORTHWHILE = 0.25
"""Least share of the examples that must fit a further, shorter row length."""


def trainer_config(recipe: Recipe, datasets: Mapping[str, Dataset], model: ModelConfig) -> TrainerConfig:
    """Returns the trainer's sizes. Raises ConfigError if an adapter cannot be attached to the model."""
    lengths = row_lengths(datasets)
    ranks = [_ranks(name, adapter.lora, model) for name, adapter in recipe.adapters.items()]
    layout = adapter_geometry(model, PAGE_SIZE).layout
    return TrainerConfig(
        num_pages=1 + sum(int(layout.num_pages(one.max(0))) for one in ranks),
        max_adapters=len(ranks),
        max_lora_rank=max(int(one.max()) for one in ranks),
        lengths=lengths,
        tokens=(micro_step_tokens(recipe, datasets, lengths[-1]),),
        dtype=recipe.dtype,
    )


def longest_example(recipe: Recipe, model: ModelConfig) -> int:
    """Returns the tokens of the longest example. Raises ConfigError if the model has fewer positions."""
    positions = model.max_position_embeddings
    if (recipe.max_length or 0) > positions:
        raise ConfigError(f"max_length={recipe.max_length}: the model has {positions} positions; lower it")
    return recipe.max_length or min(DEFAULT_MAX_LENGTH, positions)


def row_lengths(datasets: Mapping[str, Dataset]) -> tuple[int, ...]:
    """Returns the row lengths for the examples' lengths, ascending: the longest, and halves of it that many fit."""
    sizes = [len(one.ids) - 1 for data in datasets.values() for part in (data.train, data.evaluation) for one in part]
    lengths = [_rounded(max(sizes))]
    while len(lengths) < _MOST_LENGTHS and lengths[0] > _ROUNDING:
        half = _rounded(lengths[0] // 2)
        if half == lengths[0] or sum(size <= half for size in sizes) < _WORTHWHILE * len(sizes):
            break
        lengths.insert(0, half)
    return tuple(lengths)


def micro_step_tokens(recipe: Recipe, datasets: Mapping[str, Dataset], longest_row: int) -> int:
    """Returns the tokens of a micro-step: the recipe's, or those of a whole iteration if these are fewer."""
    iteration = 0.0
    for name, adapter in recipe.adapters.items():
        train = datasets[name].train
        iteration += adapter.batch_size * sum(len(one.ids) - 1 for one in train) / len(train)
    rows = min(recipe.micro_step_tokens // longest_row, -(-round(iteration) // longest_row))
    return max(1, rows) * longest_row


def _ranks(name: str, lora: LoraConfig, model: ModelConfig) -> np.ndarray:
    """Ranks `[num_layers, 7]` of an adapter."""
    try:
        targets = resolve_targets(lora, model.num_layers)
    except AdapterError as error:
        raise ConfigError(f"adapters.{name}.lora.{error}") from None
    ranks = np.zeros((model.num_layers, len(PROJECTIONS)), np.int32)
    for (layer, projection), target in targets.items():
        ranks[layer, PROJECTIONS.index(projection)] = target.rank
    return ranks


def _rounded(length: int) -> int:
    return -(-length // _ROUNDING) * _ROUNDING
