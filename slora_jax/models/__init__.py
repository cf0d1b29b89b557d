"""The base model: one decoder for all families, its weights, and a cache of converted weights."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig
    from slora_jax.models.decoder import Decoder, Params, Stack, StepContext
    from slora_jax.models.init import abstract_decoder, init_random
    from slora_jax.models.load import load_model
    from slora_jax.models.traits import RopeConfig
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        config="ModelConfig",
        decoder="Decoder Params Stack StepContext",
        init="abstract_decoder init_random",
        load="load_model",
        traits="RopeConfig",
    )
