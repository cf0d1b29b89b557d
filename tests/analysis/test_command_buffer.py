"""A decode step is one CUDA graph, as XLA's list of thunks for an absent H200 shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_step.py")


@pytest.fixture(scope="module")
def thunks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One line a thunk; those inside another are indented."""
    dump = tmp_path_factory.mktemp("dump")
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_module_re=decode.*"
    subprocess.run([sys.executable, str(SCRIPT)], env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=240)
    (path,) = dump.glob("*decode_16_lora.thunk_sequence_after_thunk_passes.txt")
    return [line for line in path.read_text().splitlines() if re.match(r"\s*\d+: k", line)]


def test_a_step_is_one_command_buffer(thunks):
    assert [line for line in thunks if not line.startswith(" ")] == [thunks[0]]
    assert "kCommandBuffer" in thunks[0]


def test_the_command_buffer_has_the_kernels_of_both_layers(thunks):
    assert sum("kCustomCall" in line for line in thunks) == 2 * (8 + 1)


def test_a_shrink_has_the_dependencies_of_the_base_product_beside_it(thunks):
    """So the graph may run the two side by side."""
    first = next(i for i, line in enumerate(thunks) if "kCustomCall" in line)
    shrink, product = thunks[first], thunks[first + 1]
    assert "gemm_fusion_dot" in product
    number = re.match(r"\s*(\d+):", shrink)[1]
    assert f"prev={number} " not in product
    assert re.search(r"prev=(\d+)", shrink)[1] == re.search(r"prev=(\d+)", product)[1]
