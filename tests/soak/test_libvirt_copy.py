"""A target without room, under libvirt, in a libvirt that has seen it mounted: `make soak`."""

import os

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import libvirt_host, make_chain

from qmpblock.errors import UnsupportedError
from qmpblock.testing.faults import small_file_system

pytestmark = [pytest.mark.live, pytest.mark.soak]


async def test_a_target_without_room_is_none(vm_dir, qemu_binary):
    """QEMU ends libvirt's job; the guest goes on where it was, and nothing is left."""
    (vm_dir / "images").mkdir()
    try:
        small = small_file_system(vm_dir / "small", 512 << 10)
        async with small as full:
            with libvirt_host() as host:
                chain = make_chain(vm_dir / "images", qemu_binary)
                domain = Domain(host, "small", qemu_binary, chain)
                domain.written |= {(0, 0): 1, (0, 1024): 2}
                target = str(full / "copy.qcow2")
                code, _, err = await cli("copy", "--pivot", domain.address, "vda", target)
                assert code == 1, err
                assert os.strerror(28) in err
                assert "the guest is where it was" in err
                assert not list(full.iterdir())
                domain.write(5, 8192)
                assert domain.chains() == (["top.qcow2", "base.qcow2"], "top.qcow2")
                assert await domain.layers() == ["top.qcow2", "base.qcow2"]
                assert "running" in domain.virsh("domstate")
                domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "later")
                domain.end()
    except UnsupportedError as error:
        pytest.skip(str(error))
