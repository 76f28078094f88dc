"""A Linux that keeps a log in a file system goes over while it writes: nothing of it is lost."""

import pytest
from migratinglinux import log_goes_over

from qmpblock.testing.linux import LinuxImage, LinuxUnavailableError

pytestmark = pytest.mark.live


async def test_a_file_system_and_a_growing_log(vm_dir, qemu_binary):
    try:
        image = await LinuxImage.prepare(qemu_binary)
    except LinuxUnavailableError as error:
        pytest.skip(f"no Linux guest: {error}")
    await log_goes_over(image, image, vm_dir, qemu_binary)
