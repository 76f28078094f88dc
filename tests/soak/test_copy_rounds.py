"""Copies of disks to which the guest writes throughout, by chance: `make soak`."""

import pytest
from copyrounds import copies_under_stress
from rounds import rounds

pytestmark = [pytest.mark.live, pytest.mark.soak]


async def test_copies_while_the_guest_writes(start_qemu, vm_dir, qemu_binary, qemu_version):
    count, chance = rounds(200)
    print(await copies_under_stress(start_qemu, vm_dir, qemu_binary, qemu_version, chance, count))


async def test_copies_that_are_broken_off_and_gone_on_from(
    start_qemu, vm_dir, qemu_binary, qemu_version
):
    count, chance = rounds(60)
    drawing = (start_qemu, vm_dir, qemu_binary, qemu_version, chance, count)
    print(await copies_under_stress(*drawing, broken=True))
