"""slora-jax as a worker: `python -m experiments.vllm_comparison.slora_worker`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from experiments.vllm_comparison.protocol import Generate, run_worker
from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter

TARGETS = ("q", "k", "v", "o")
"""Projections that every adapter of the comparison changes."""


def start(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    """Builds the engine.

    Args:
      settings: "model": a directory. "engine": fields of `EngineConfig`. "adapters": PEFT directories by name.
        "random_adapters": {"prefix", "count", "rank"} of adapters that are made in memory.
    """
    engine = Engine.from_pretrained(settings["model"], EngineConfig(**settings["engine"]))
    for name, path in settings["adapters"].items():
        engine.load_adapter(name, path)
    many = settings["random_adapters"]
    for i in range(many["count"]):
        engine.load_adapter(
            f"{many['prefix']}{i}", random_adapter(engine.store.geometry, many["rank"], TARGETS, seed=i)
        )

    def generate(prompts: list[list[int]], adapters: list[str | None], output: int) -> list[list[int]]:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True), adapters=adapters)
        return [list(output.token_ids) for output in outputs]

    return generate, {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}


if __name__ == "__main__":
    run_worker(start)
