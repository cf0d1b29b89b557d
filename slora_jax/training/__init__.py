"""Training of many adapters at once, over a base model that may be serving at the same time."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.training.batch import Example
    from slora_jax.training.config import Adam, TrainerConfig
    from slora_jax.training.losses import LOSSES, Loss
    from slora_jax.training.trainer import Outcome, StepReport, Trainer
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        batch="Example",
        config="Adam TrainerConfig",
        losses="LOSSES Loss",
        trainer="Outcome StepReport Trainer",
    )
