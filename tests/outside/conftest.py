"""Every test of this project runs once on each QEMU that OUTSIDE_QEMUS names."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", params=os.environ["OUTSIDE_QEMUS"].split(":"))
def qemu_binary(request: pytest.FixtureRequest) -> str:
    return str(request.param)
