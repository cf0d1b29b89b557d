"""Tiny checkpoints made by transformers, and a dense reference context for the decoder."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from pallas_kernels.experts import expert_outputs

torch.set_num_threads(1)

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class DenseContext:
    """Causal attention within each sequence of a ragged token list; no adapters."""

    def __init__(self, sequences: jax.Array, positions: jax.Array, score_cap: float | None = None):
        """sequences and positions int32 `[T]`: which sequence each token belongs to, and where in it."""
        self.same_sequence, self.positions = sequences[:, None] == sequences[None, :], positions
        self.score_cap = score_cap

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        distance = self.positions[:, None] - self.positions[None, :]  # [T, T]
        visible = self.same_sequence & (distance >= 0) & (distance < (window or distance.size))
        group = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)  # [T, H, hd]
        scores = jnp.einsum("thd,shd->hts", q, k, precision="highest", preferred_element_type=jnp.float32)
        scores = scores * q.shape[-1] ** -0.5
        if self.score_cap is not None:
            scores = self.score_cap * jnp.tanh(scores / self.score_cap)
        scores = jnp.where(visible, scores, -jnp.inf)  # [H, T, T]
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("hts,shd->thd", weights, v, precision="highest")

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return y

    def lookup(self, embedding: Callable[[jax.Array], jax.Array], tokens: jax.Array) -> jax.Array:
        return embedding(tokens)

    def experts(self, layer: int, *arrays: jax.Array) -> jax.Array:
        return expert_outputs(*arrays[:-1], activation=arrays[-1])

    def reduce(self, y: jax.Array) -> jax.Array:
        return y


@jax.jit(static_argnums=0)
def _logits(graphdef, params, tokens, positions, sequences):
    model = nnx.merge(graphdef, params)
    context = DenseContext(sequences, positions, model.config.score_cap)
    return model.logits(model(tokens, positions, context))


@pytest.fixture
def dense_context() -> type[DenseContext]:
    return DenseContext


@pytest.fixture
def decoder_logits() -> Callable[..., np.ndarray]:
    """Returns `run(graphdef, params, prompts)`: float32 logits `[T, vocab]` of all prompts as one ragged list."""

    def run(graphdef, params, prompts):
        tokens = np.concatenate(prompts).astype(np.int32)
        positions = np.concatenate([np.arange(len(p)) for p in prompts]).astype(np.int32)
        sequences = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts]).astype(np.int32)
        return np.asarray(_logits(graphdef, params, tokens, positions, sequences))

    return run


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """Returns a function that saves a tiny model whose attention and rotation matter: (directory, model).
    rounded: to weights of bfloat16, stored as float32."""

    def make(family: str, max_shard_size: str = "1GB", rounded: bool = False, **overrides):
        config = transformers.AutoConfig.for_model(family, **{**TINY, **overrides})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.copy_(1 + 0.2 * torch.randn_like(weight))
                elif name.endswith("bias"):
                    weight.copy_(0.3 * torch.randn_like(weight))
                else:
                    weight.copy_(0.2 * torch.randn_like(weight))
                if rounded:
                    weight.copy_(weight.bfloat16())
        directory = tmp_path_factory.mktemp(family)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return directory, model

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint) -> Path:
    """An untied Llama in several shards. Shared: copy before changing."""
    directory, _ = make_checkpoint("llama", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory
