"""Every notebook runs from top to bottom, from its folder or from the root, and is committed with its outputs."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 900
"""Limit of a cell, so that one that hangs is named."""
PICTURE_BYTES = 200_000
"""Largest picture in a committed notebook."""


def by_name(notebook: Path) -> str:
    return notebook.stem


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment of a kernel that imports this checkout, on a CPU, with the tests' cache of compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str]) -> None:
    """Runs all cells with `folder` as the working directory; an error shows the cell that failed."""
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs_from_top_to_bottom(file, environment):
    folder = (file.parent, ROOT)[NOTEBOOKS.index(file) % 2]
    notebook = nbformat.read(file, as_version=4)
    if "smollm2_path" in file.read_text(encoding="utf-8"):  # a real model's products are worth LLVM's optimisations
        flags = [flag for flag in environment["XLA_FLAGS"].split() if "optimization_level" not in flag]
        environment = environment | {"XLA_FLAGS": " ".join(flags)}
    execute(notebook, folder, environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # it draws something
    warned = [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warned


@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_committed_with_small_clean_outputs(file):
    nbformat.validate(nbformat.read(file, as_version=4))
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == [*range(1, len(cells) + 1)], f"run python notebooks/execute.py {file.name}"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data", "execute_result") and output.get("name") != "stderr"
        assert len(output.get("data", {}).pop("image/png", "")) < 4 / 3 * PICTURE_BYTES
        text = json.dumps(output)
        assert "widget" not in text and not re.search(r"(?<![\w.:/])/[\w.-]+/[\w.-]+", text)  # an absolute path


def test_an_error_in_a_cell_fails_and_shows_the_cell(environment):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("claim = 1\nassert claim == 2")])
    with pytest.raises(CellExecutionError, match="assert claim == 2"):
        execute(notebook, ROOT, environment)
