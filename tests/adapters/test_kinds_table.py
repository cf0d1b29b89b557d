"""docs/adapters.md: the table of adapter kinds is what configs and settings accept."""

from pathlib import Path

import pytest

from slora_jax import EngineConfig
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.targets import resolve_ends
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.training.recipe import LORA_FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
KINDS = {
    "LoRA on projections": {},
    "rsLoRA": {"use_rslora": True},
    "ranks and alphas by module": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
    "PiSSA, OLoRA, CorDA, LoftQ, converted": {"init_lora_weights": True, "loftq_config": {"loftq_bits": 4}},
    "PiSSA, OLoRA, CorDA, LoftQ, as trained": {"init_lora_weights": "pissa"},
    "activated LoRA (aLoRA)": {"alora_invocation_tokens": [1, 2]},
    "DoRA": {"use_dora": True},
    "biases of B": {"lora_bias": True},
    "trained biases": {"bias": "all"},
    "LoRA on head or embedding": {"target_modules": ["q_proj", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [1]},
    "head or embedding saved whole, at most 256 rows changed": {"modules_to_save": ["lm_head"]},
    "other modules saved whole": {"modules_to_save": ["score"]},
    "LoRA on experts": {"target_parameters": ["experts.down_proj"]},
}
BACKENDS = {
    "XLA and Triton": {},
    '`lora="bmm"`': {"lora": "bmm"},
    '`lora="merge"`': {"lora": "merge"},
    "several GPUs": {"tensor_parallel_size": 2},
}


def cell(fields: dict, settings: dict) -> str:
    """How an adapter of this kind is treated under these settings of the engine."""
    try:
        config = LoraConfig.from_json({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields)
    except AdapterError:
        return "refused"
    if config.alora_invocation_tokens:
        return "refused" if settings.get("lora") == "merge" else "served"
    ends = bool(resolve_ends(config) or config.tokens or config.modules_to_save)
    if not config.extras and not ends:
        return "served"
    if (ends or config.target_parameters) and "tensor_parallel_size" in settings:
        return "refused"
    try:
        EngineConfig(adapter_extras=True, **settings)
    except ConfigError:
        return "refused"
    return "with `adapter_extras`"


def trained(fields: dict) -> str:
    plain = fields.get("target_modules", ["q_proj"]) == ["q_proj"]
    return "trained" if plain and set(fields) <= set(LORA_FIELDS) else "not trained"


def table() -> str:
    heads = ["adapter", *BACKENDS, "`slora train`"]
    rows = [
        [kind, *(cell(fields, one) for one in BACKENDS.values()), trained(fields)] for kind, fields in KINDS.items()
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines) + "\n"


def test_table_of_adapter_kinds_is_up_to_date() -> None:
    """If it fails, the message has the table to put between the markers."""
    text = PAGE.read_text()
    begin, end = text.index("<!-- kinds -->\n") + len("<!-- kinds -->\n"), text.index("<!-- end -->")
    assert text[begin:end] == table(), table()


def test_page_names_every_refused_variant() -> None:
    pytest.importorskip("peft")
    from slora_jax.adapters.config import REFUSED

    old = {"enable_lora", "megatron_config"}
    assert all(f"`{name}`" in PAGE.read_text() for name in REFUSED.keys() - old)
