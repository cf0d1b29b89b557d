"""A decode step is one CUDA graph in which LoRA runs beside the base model, as XLA's log for an absent H200 shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slora_jax.analysis.graph import LOG, Graph, read_graph

SCRIPT = Path(__file__).with_name("compile_step.py")
LAYERS = 2


@pytest.fixture(scope="module")
def graph() -> Graph:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=os.environ | LOG, check=True, timeout=240, stderr=subprocess.PIPE, text=True
    )
    return read_graph(done.stderr)  # raises if the step is not one graph


def custom_calls(graph: Graph) -> list[int]:
    return [i for i, node in enumerate(graph.nodes) if node.name == "kCustomCall"]


def test_the_graph_has_the_kernels_of_all_layers(graph) -> None:
    assert len(custom_calls(graph)) == LAYERS * (8 + 1)


def test_the_graph_is_no_chain(graph) -> None:
    assert not graph.is_sequential


def test_each_shrink_runs_beside_its_base_product(graph) -> None:
    """Both wait for the norm, the attention or the activation, and neither for the other; the expand waits for both."""
    calls = custom_calls(graph)
    for layer in range(LAYERS):
        lora = calls[9 * layer :][:9]
        del lora[2]  # attention, after the expand of q, k and v
        for shrink, expand in zip(lora[::2], lora[1::2], strict=True):
            assert shrink in graph.nodes[expand].after
            before_shrink, before_expand = graph.ancestors(shrink), graph.ancestors(expand)
            products = {i for i in before_expand - before_shrink if "gemm" in graph.nodes[i].name}
            before_product = products.union(*map(graph.ancestors, products))
            assert products and shrink not in before_product
            more = before_shrink - before_product
            if shrink == calls[0]:  # it waits for the step's lists of tiles, which wait for no product and no kernel
                computed = "kCustomCall", "gemm"
                assert not any(word in graph.nodes[i].name for i in more for word in computed)
            else:
                assert not more
