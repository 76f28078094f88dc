"""Every VM must end as it began here too."""

import pytest
from hosts import ssh_host  # noqa: F401  # a fixture
from libvirthost import libvirt  # noqa: F401  # a fixture
from migrating import begin  # noqa: F401  # a fixture


@pytest.fixture(autouse=True)
def _every_vm_ends_as_it_began(invariant):
    """The fixture does it."""
