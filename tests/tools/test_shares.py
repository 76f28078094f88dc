"""The shares of the live tests that a run takes: each is of something that is there."""

import runpy
from pathlib import Path

import pytest

LIVE = Path(__file__).parents[1] / "live"
SHARES = runpy.run_path(str(LIVE / "conftest.py"))["SHARES"]


@pytest.mark.parametrize("name", SHARES)
def test_what_is_sampled_is_there(name):
    """A test that is renamed would run whole, and nobody would see it but the clock."""
    module, _, function = name.partition("::")
    assert f"def {function}" in (LIVE / f"{module}.py").read_text()


@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_a_part(name):
    assert 0 < SHARES[name] < 1
