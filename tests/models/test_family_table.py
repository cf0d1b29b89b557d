"""The table of `docs/models.md` is what the families' files say."""

from pathlib import Path

import pytest

from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig
from slora_jax.models.families.registry import FAMILIES
from slora_jax.models.gguf.config import GGUF_FAMILIES
from slora_jax.parallel.mesh import cut

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
HEADER = (
    "`model_type`", "Norms", "q, k norm", "Windows", "Rotary embedding", "Scores, logits", "Fused", "Experts", "Shards",
    "GGUF",
)  # fmt: skip


def config_of(name: str) -> ModelConfig:
    """The config of a small model of the family, with its defaults and its window on."""
    given: dict[str, object] = dict(SIZES)
    if name not in ("llama", "granite", "olmo2", "glm4"):
        given["sliding_window"] = 8
    if name in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        given |= {"use_sliding_window": True, "max_window_layers": 6}
    if FAMILIES[name].text_config:
        given = {"text_config": given}
    return ModelConfig.from_dict({"model_type": name, **given})


def row(name: str) -> list[str]:
    family, config = FAMILIES[name], config_of(name)
    kinds = set(config.kinds)
    windows = {kind.window is not None for kind in kinds}
    rotary = [
        "half of a head, neighbours" if config.rope.interleaved else "",
        "any share of a head" if name == "phi3" else "",
        "not in every layer" if {kind.rope is None for kind in kinds} == {True, False} else "",
        "two bases" if len(config.ropes) > 1 else "",
    ]
    scores = [
        "own scale" if config.attention_scale else "",
        "limited scores" if config.score_cap else "",
        "limited logits" if config.logit_cap else "",
        "multipliers" if name == "granite" else "",
    ]
    try:
        cut(config, 2).of_model(config)
        shards = "yes"
    except ConfigError:
        shards = "refused"
    return [
        f"`{name}`",
        config.norms + (", 1 + w" if family.norm_offset else ""),
        {"head": "per head", "width": "whole width", None: ""}[config.qk_norm],
        {(True,): "all layers", (False,): "", (False, True): "some layers"}[tuple(sorted(windows))],
        ", ".join(filter(None, rotary)),
        ", ".join(filter(None, scores)),
        ", ".join(family.fused),
        "yes" if config.experts else "",
        shards,
        "yes" if name in GGUF_FAMILIES else "",
    ]


def test_table_of_families_is_up_to_date() -> None:
    rows = [HEADER, ["---"] * len(HEADER), *map(row, sorted(FAMILIES))]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    table = "\n".join(" ".join(line.split()) for line in table.splitlines())
    if table not in PAGE.read_text():
        pytest.fail(f"docs/models.md must contain this table:\n{table}")
