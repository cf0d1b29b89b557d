"""A tiny model, a trainer over it, and an engine that serves it."""

from collections.abc import Iterator

import pytest
from tiny_model import TinyModel

from slora_jax import Engine
from slora_jax.training import Trainer, TrainerConfig

CONFIG = TrainerConfig(num_pages=1200, max_adapters=12, lengths=(64,), tokens=(256,), dtype="float32", page_size=8)


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    return TinyModel()


@pytest.fixture(scope="session")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with tiny.engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def shared_trainer(engine: Engine) -> Trainer:
    return Trainer.of_engine(engine, CONFIG)


@pytest.fixture
def trainer(shared_trainer: Trainer) -> Iterator[Trainer]:
    """The shared trainer, whose programs are compiled once. After the test, its adapters are removed."""
    yield shared_trainer
    for name in shared_trainer.names():
        shared_trainer.remove(name)
    assert shared_trainer.pool.allocator.num_free == shared_trainer.pool.allocator.capacity
