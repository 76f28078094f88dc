"""A seeded sample, under libvirt, of kills, and of what that is asked for; tests/soak has all.

One of the two a run, at one point.
"""

import pytest
from libvirtcrossed import OURS, cross_some
from libvirthost import libvirt_host
from libvirtkills import MOVES, OPERATIONS, kill_some

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def host(qemu_binary):
    with libvirt_host() as host:
        yield host


@pytest.mark.parametrize(
    ("some", "operations"), [(kill_some, OPERATIONS + MOVES), (cross_some, OURS)]
)
async def test_at_any_command(some, operations, host, vm_dir, qemu_binary):
    assert await some(host, operations, 1, vm_dir, qemu_binary) > 0
