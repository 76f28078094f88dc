"""Every VM must end as it began here too."""

import pytest


@pytest.fixture(autouse=True)
def _every_vm_ends_as_it_began(invariant):
    """The fixture does it."""
