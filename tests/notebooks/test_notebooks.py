"""Every notebook runs from top to bottom, from its folder or from the root, and is committed without outputs."""

import json
import os
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 120
"""For all cells of a notebook together, on a machine that does little else."""


def by_name(notebook: Path) -> str:
    return notebook.stem


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a kernel that imports this checkout, on a CPU, with the tests' cache of compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str]) -> None:
    """Runs all cells with `folder` as the working directory; an error shows the cell that failed."""
    end = time.monotonic() + SECONDS
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs_from_top_to_bottom(file, environment):
    folder = (file.parent, ROOT)[NOTEBOOKS.index(file) % 2]
    notebook = nbformat.read(file, as_version=4)
    execute(notebook, folder, environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # it draws something
    warned = [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warned


@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_valid_and_has_no_outputs(file):
    nbformat.validate(nbformat.read(file, as_version=4))
    content = json.loads(file.read_text(encoding="utf-8"))
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {number} has outputs: run nbstripout {file.name}"
            assert cell["execution_count"] is None, f"cell {number} has an execution count: run nbstripout {file.name}"


def test_an_error_in_a_cell_fails_and_shows_the_cell(environment):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("claim = 1\nassert claim == 2")])
    with pytest.raises(CellExecutionError, match="assert claim == 2"):
        execute(notebook, ROOT, environment)
