"""Losses, gradients and AdamW steps of PEFT and torch, and examples for them."""

from typing import Any

import numpy as np
import torch
from peft_families import VOCAB, PeftFamily
from small_families import SmallFamily

from slora_jax.training import Example


def examples(rng: np.random.Generator, lengths: tuple[int, ...], vocab: int = VOCAB) -> list[Example]:
    """Random sequences, about two thirds of whose positions are trained."""
    made = []
    for length in lengths:
        ids = rng.integers(0, vocab, length + 1).astype(np.int32)
        weights = (rng.random(length) < 2 / 3).astype(np.float32)
        made.append(Example(ids[:-1], ids[1:], weights))
    return made


def torch_loss(model: Any, batch: list[Example]) -> Any:
    """The sum of weighted cross-entropies of each example, computed by itself."""
    total = torch.zeros(())
    for example in batch:
        logits = model(torch.tensor(example.tokens[None]).long()).logits[0]
        logprobs = torch.log_softmax(logits, -1)[
            torch.arange(len(example.tokens)), torch.tensor(example.targets).long()
        ]
        total = total - (torch.tensor(example.weights) * logprobs).sum()
    return total


def torch_gradients(
    family: PeftFamily | SmallFamily, adapter: str, batch: list[Example]
) -> tuple[float, dict[Any, Any]]:
    """Loss, and gradients by `(layer, module, "A" or "B")`."""
    model = family.active(adapter)
    parameters = lora_parameters(model, adapter)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    loss = torch_loss(model, batch)
    loss.backward()
    return float(loss.detach()), {key: parameter.grad.numpy() for key, parameter in parameters.items()}


def lora_parameters(model: Any, adapter: str) -> dict[tuple[int, str, str], Any]:
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if f"lora_A.{adapter}." in name or f"lora_B.{adapter}." in name:
            at = parts.index("layers")
            found[int(parts[at + 1]), parts[at + 3].removesuffix("_proj"), parts[at + 4][-1]] = parameter
    return found
