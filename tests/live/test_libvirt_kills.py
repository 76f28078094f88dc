"""A seeded sample, under libvirt, of kills, and of what that is asked for; tests/soak has all.

One of the two a run, at one point.
"""

import pytest
from libvirtcrossed import OURS, cross_some
from libvirtkills import MOVES, OPERATIONS, kill_some

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    ("some", "operations"), [(kill_some, OPERATIONS + MOVES), (cross_some, OURS)]
)
async def test_at_any_command(some, operations, libvirt, vm_dir, qemu_binary):
    assert await some(libvirt, operations, 1, vm_dir, qemu_binary) > 0
