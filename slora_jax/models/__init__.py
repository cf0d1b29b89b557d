"""The base model: Llama, Mistral, Qwen2 and Qwen3 decoders, their weights, and a cache of converted weights."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig, RopeConfig
    from slora_jax.models.decoder import Decoder, Params, Stack, StepContext
    from slora_jax.models.init import abstract_decoder, init_random
    from slora_jax.models.load import load_model
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        config="ModelConfig RopeConfig",
        decoder="Decoder Params Stack StepContext",
        init="abstract_decoder init_random",
        load="load_model",
    )
