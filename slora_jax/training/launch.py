"""Training from a recipe: checks recipe, data and checkpoint first, then loads the model and trains."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from slora_jax.engine.config import EngineConfig
from slora_jax.engine.programs import keep_compiled_programs
from slora_jax.engine.text import load_tokenizer
from slora_jax.errors import CheckpointError, ConfigError
from slora_jax.models.config import ModelConfig, model_names
from slora_jax.models.hf import checkpoint_files
from slora_jax.phases import phase
from slora_jax.training.checkpoint import Checkpoints
from slora_jax.training.data import Dataset, Encoder, load_datasets
from slora_jax.training.recipe import Recipe
from slora_jax.training.run import Course, Run
from slora_jax.training.sizing import longest_example, trainer_config
from slora_jax.training.trainer import Trainer

_LOG = logging.getLogger(__name__)


def train(model_dir: Path, recipe: Recipe, restart: bool = False, progress: bool = True) -> dict[str, Course]:
    """Trains the adapters of a recipe, from its newest checkpoint if there is one.

    Args:
      model_dir: Hugging Face directory or GGUF file of the base model.
      restart: whether to remove earlier checkpoints and start anew.
      progress: whether to show a progress bar.

    Returns:
      The course of every adapter, by name.

    Raises:
      ConfigError: the recipe does not fit the model, the data is bad, or the checkpoint is of another recipe.
      CheckpointError, UnsupportedModelError: the model cannot be loaded.
      KeyboardInterrupt: see `Run.run`.
    """
    model = ModelConfig.from_directory(model_dir)
    with phase("tokenizer"):
        tokenizer = load_tokenizer(model_dir)
    if tokenizer is None:
        raise CheckpointError(f"{model_dir}: has no tokenizer, which training needs; add its tokenizer.json")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(model.eos_token_ids), None)
    encoder = Encoder(tokenizer, end, longest_example(recipe, model), recipe.too_long == "cut")
    with phase("data"):
        datasets = load_datasets(recipe, encoder)
    for warning in dict.fromkeys(warning for data in datasets.values() for warning in data.warnings):
        _LOG.warning("%s", warning)
    config = trainer_config(recipe, datasets, model)
    with _locked(recipe.output), closing(_checkpoints(model_dir, model, recipe, datasets)) as checkpoints:
        if restart:
            checkpoints.clear()
        checkpoints.check()
        keep_compiled_programs(EngineConfig.compilation_cache_dir)
        trainer = Trainer.from_pretrained(model_dir, config)
        base = min(model_names(model_dir))
        return Run(recipe, datasets, trainer, checkpoints, base, progress).run()


def _checkpoints(model_dir: Path, model: ModelConfig, recipe: Recipe, datasets: Mapping[str, Dataset]) -> Checkpoints:
    """Opens the checkpoints, whose conditions are the recipe, the examples, and the model's config, names and sizes of
    files."""
    conditions = recipe.conditions()
    for name, data in datasets.items():
        conditions["adapters"][name]["data"] = data.digest()
    files = {file.name: file.stat().st_size for file in checkpoint_files(model_dir)}
    conditions["model"] = json.loads(json.dumps(asdict(model))) | {"files": files}
    return Checkpoints(recipe.output / "checkpoints", conditions)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Creates the output directory and keeps other processes from training into it. Raises ConfigError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written: {error.strerror}; name another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output={output}: another process is training into it; name another") from None
        yield
