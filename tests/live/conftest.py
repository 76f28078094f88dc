"""This project's live tests: every VM of `start_qemu` must end as it began."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _every_vm_ends_as_it_began(request: pytest.FixtureRequest) -> None:
    if "start_qemu" in request.fixturenames:
        request.getfixturevalue("invariant")
