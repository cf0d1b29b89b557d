"""The model configs in experiments/models have the sizes of their names."""

import math
import re
from pathlib import Path

import jax
import pytest

from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.models.config import read_json

MODELS = Path(__file__).parents[2] / "experiments" / "models"

# billions of parameters; layers; hidden, feed-forward and key-value width; vocabulary
EXPECTED = {
    "llama-7b": (6.74, 32, 4096, 11008, 4096, 32000),
    "llama-13b": (13.02, 40, 5120, 13824, 5120, 32000),
    "llama-30b": (30.4, 48, 7168, 19456, 7168, 32000),
    "llama-70b": (70.3, 80, 8192, 24576, 8192, 32000),
    "llama-3-8b": (8.03, 32, 4096, 14336, 1024, 128256),
    "llama-3-70b": (70.55, 80, 8192, 28672, 1024, 128256),
    "qwen3-8b": (8.19, 36, 4096, 12288, 1024, 151936),
    "qwen3-32b": (32.76, 64, 5120, 25600, 1024, 151936),
    "phi-4": (14.66, 40, 5120, 17920, 1280, 100352),
    "gemma-3-12b": (11.77, 48, 3840, 15360, 2048, 262208),  # without the images' tower
    "qwen3-30b-a3b": (30.53, 48, 2048, 6144, 512, 151936),
}
SMALL = {
    "tiny-llama", "mini-llama", "wide-llama", "llama-110m", "llama-27m", "small-llama", "one-layer-llama",
    "micro-llama", "smollm2-135m",
}  # fmt: skip


def test_every_file_is_listed() -> None:
    assert {path.stem for path in MODELS.glob("*.json")} == EXPECTED.keys() | SMALL


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_has_the_sizes_of_its_model(name: str) -> None:
    model = ModelConfig.from_dict(read_json(MODELS / f"{name}.json"))
    billions, *shape = EXPECTED[name]
    width = (model.num_layers, model.hidden_size, model.intermediate_size, model.kv_width, model.vocab_size)
    assert list(width) == shape
    assert model.head_dim == (256 if model.family == "gemma3" else 128)
    _, params = abstract_decoder(model, "bfloat16")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, rel=5e-3)
    assert adapter_geometry(model, 16).layout.width == model.kv_width


def test_the_settings_table_links_existing_files() -> None:
    rows = re.findall(r"^\| (S\d).*?\[(\S+)\]\((\S+)\)", (MODELS / "README.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == ["S1", "S2", "S3", "S4", "S5", "S6"]
    assert all(label == link and (MODELS / link).exists() for _, label, link in rows)
