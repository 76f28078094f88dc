"""What the runs of pytest share that these tests start."""

import pytest


@pytest.fixture(autouse=True)
def _no_plugin_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Hypothesis and xdist takes a third of the time of a run with one test."""
    names = ("hypothesispytest", "xdist", "timeout")
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in names))
