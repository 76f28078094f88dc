"""A seeded sample, under libvirt, of kills, and of what that is asked for; tests/soak has all.

One of the two a run, at one point.
"""

import pytest
from dying import ASKED
from libvirtcrossed import EVERY, THEIRS, Crossings, cross_some
from libvirtkills import COMMITS, MOVES, OPERATIONS, kill_some

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    ("some", "operations"),
    [(kill_some, (*OPERATIONS, *COMMITS, *MOVES)), (cross_some, EVERY)],
)
async def test_at_any_command(some, operations, libvirt, vm_dir, qemu_binary):
    assert await some(libvirt, operations, 1, vm_dir, qemu_binary) > 0


@pytest.mark.parametrize("theirs", ["pivot", "snapshot"])
@pytest.mark.parametrize("ours", [one for one in MOVES if one.name == "move-top"], ids=str)
async def test_as_ours_pivots(ours, theirs, libvirt, vm_dir, qemu_binary):
    """What waits in libvirt for ours comes before we can look where the guest is."""
    [one] = [one for one in THEIRS if one.name == theirs]
    async with Crossings(libvirt, ours, vm_dir, qemu_binary) as matrix:
        paused = [n for n, sent in enumerate(matrix.trace, 1) if sent == "blockdev-add"][-1]
        asked = [n for n, sent in enumerate(matrix.trace, 1) if sent == ASKED and n > paused]
        came = await matrix.met(asked[1], "before", one)
    assert came is not None
    assert came[0] == "theirs done"
