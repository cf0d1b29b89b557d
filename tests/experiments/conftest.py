"""The paper's raw results."""

import pytest

from experiments.paper import load_rows


@pytest.fixture(scope="session")
def paper_rows():
    """All published rows."""
    return load_rows()
