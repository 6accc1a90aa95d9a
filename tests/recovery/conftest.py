import pytest

from flower_split import failpoints


@pytest.fixture(autouse=True)
def no_failpoints():
    """Every test begins and ends with all failpoints off."""
    failpoints.reset()
    yield
    failpoints.reset()
