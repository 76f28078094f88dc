"""Kill matrices of libvirt's domains, and all that it may be asked for in between: `make soak`."""

import pytest
from libvirtcrossed import EVERY, cross_all
from libvirtkills import COMMITS, MOVES, OPERATIONS, kill_all

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("operation", [*OPERATIONS, *COMMITS, *MOVES], ids=str)
async def test_killed_at_every_command(operation, libvirt, vm_dir, qemu_binary):
    await kill_all(libvirt, operation, vm_dir, qemu_binary)


@pytest.mark.parametrize("operation", EVERY, ids=str)
async def test_libvirt_is_asked_at_every_change(operation, libvirt, vm_dir, qemu_binary):
    await cross_all(libvirt, operation, vm_dir, qemu_binary)
