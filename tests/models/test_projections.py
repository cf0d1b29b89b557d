"""The table of projections agrees with the kernels' rank vectors and with the benchmark's models."""

from pallas_kernels.bench.models import LLAMA_3_8B
from pallas_kernels.lora import layout
from slora_jax.models import ModelConfig
from slora_jax.models.projections import PROJECTIONS, ROW_PARALLEL, STACKS, lora_layout


def test_projections_have_the_order_of_the_kernels_rank_vectors():
    assert tuple(PROJECTIONS) == layout.PROJECTIONS == sum(STACKS.values(), ())
    assert {"o", "down"} == ROW_PARALLEL


def test_lora_layout_has_the_widths_of_the_model():
    assert lora_layout(ModelConfig.from_dict(LLAMA_3_8B.config()), 16) == LLAMA_3_8B.layout(16)
