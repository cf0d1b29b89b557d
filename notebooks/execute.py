"""Runs notebooks from top to bottom and saves them with clean outputs: `python notebooks/execute.py [FILE ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(file: Path) -> None:
    """Runs a notebook and replaces the file. Outputs lose stderr, timestamps and the kernel's version."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if output.get("name") != "stderr"])
    nbformat.write(notebook, file)


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins consecutive pieces of text, whose number depends on timing."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        execute(Path(name))
        print(name)
