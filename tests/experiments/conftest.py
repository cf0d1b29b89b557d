"""The paper's raw results, which are no part of the project."""

import pytest

from experiments.paper import find_results, load_rows


@pytest.fixture(scope="session")
def paper_rows():
    """All published rows; skips where the file is not there."""
    try:
        file = find_results()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load_rows(file)
