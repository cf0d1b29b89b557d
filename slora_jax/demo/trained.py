"""The trained adapters of SmolLM2 that the demo shows (experiments/adapters has their data, recipe and scores)."""

from __future__ import annotations

from pathlib import Path

from slora_jax.engine import Engine
from slora_jax.scheduling import SamplingParams

DIRECTORY = Path(__file__).parent / "smollm2_adapters"
"""A PEFT directory for each adapter."""

INPUTS = {
    "sentiment": "Review: The soup was cold and the waiter forgot us twice.",
    "contacts": "Note: Maria Lopez will meet the architects in Lisbon on 4 May 2026.",
}
"""Messages for the adapters that do not answer questions."""

TOKENS = 48


def answers(engine: Engine, question: str) -> list[tuple[str, str, str]]:
    """Asks every trained adapter, and the base model wherever they are asked something else, in one batch.

    Returns:
      Name ("base model" for none), message and answer of each.
    """
    names = sorted(folder.name for folder in DIRECTORY.iterdir() if folder.is_dir())
    messages = dict.fromkeys(INPUTS.get(name, question) for name in names)
    asked: list[tuple[str | None, str]] = []
    for message in messages:
        asked += [(None, message), *((name, message) for name in names if INPUTS.get(name, question) == message)]
    for name in names:
        engine.load_adapter(name, DIRECTORY / name)
    try:
        messages_of = [[{"role": "user", "content": message}] for _, message in asked]
        outputs = engine.chat(messages_of, SamplingParams(max_tokens=TOKENS), [name for name, _ in asked])
    finally:
        for name in names:
            engine.unload_adapter(name)
    return [(name or "base model", text, out.text or "") for (name, text), out in zip(asked, outputs, strict=True)]
