"""Host space for images in use under libvirt, by an overlay that libvirt itself takes and commits.

The judge is libvirt, as in `test_libvirt_chains`: what it starts the domain from, whoever died.
"""

import json
from pathlib import Path

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import run
from libvirtpoints import FULL, HELD, killed, make_four

import qmpblock
from qmpblock.allocation.staged import reserve_by_staging
from qmpblock.errors import UnsupportedError
from qmpblock.ranges import Ranges
from qmpblock.testing.images import Tools
from qmpblock.testing.whichqemu import version_of

pytestmark = pytest.mark.live

MIB = 1 << 20


@pytest.fixture
def chain(vm_dir, qemu_binary):
    return make_four(vm_dir, qemu_binary)


def made(folder):
    """Return what is of ours in the images' directory."""
    return [path.name for path in folder.iterdir() if "qmpblock-" in path.name]


async def test_an_image_gets_its_host_space(libvirt, chain, qemu_binary):
    """By a command, and independent of what is below; libvirt goes on from there."""
    domain, folder = Domain(libvirt, "full", qemu_binary, chain, iothread=True), chain.parent
    domain.written |= HELD
    domain.write(5, 8192)
    policy = folder / "policy.yaml"
    disk = "{disk: vda, allocation: full, backing: independent}"
    policy.write_text(f"vms: [{{address: '{domain.address}', disks: [{disk}]}}]")
    code, out, err = await cli("plan", str(policy))
    assert code == 0, out + err
    code, out, err = await cli("allocate", domain.address, "vda", "--full", "--independent")
    assert code == 0, err
    code, out, err = await cli("map", domain.address, "vda", "--json")
    [extent] = json.loads(out)
    assert (extent["length"], extent["depth"], extent["data"]) == (16 * MIB, 0, True)
    assert not extent["zero"]
    assert domain.chains() == (["now.qcow2"], "now.qcow2")
    assert await domain.layers() == ["now.qcow2"]
    assert chain.stat().st_blocks * 512 >= 16 * MIB
    assert made(folder) == []
    assert "nothing to do" in (await cli("apply", str(policy)))[1]
    domain.write(6, 8256)
    domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "later")
    domain.write(7, 8320)
    domain.virsh("blockcommit", "vda", "--shallow", "--active", "--pivot")
    if version_of(qemu_binary) < (11, 0, 0):  # libvirt 9.0 saves by `migrate` with `detach`, gone
        domain.virsh("save", str(folder / "saved"))
        libvirt.virsh("restore", str(folder / "saved"))
    assert domain.chains() == (["now.qcow2"], "now.qcow2")
    domain.goes_on()
    domain.end()


async def test_several_slices_of_a_qed_image(libvirt, vm_dir, qemu_binary):
    """Each by an overlay of its own; and what libvirt is not asked for is refused."""
    image = vm_dir / "disk.qed"
    run(Tools.of(qemu_binary).img, "create", "-q", "-f", "qed", image, "8M")
    libvirt.domain("qed", image, "qed", qemu_binary)
    async with qmpblock.connect(libvirt.address("qed")) as vm:
        disk = await vm.disk("vda")
        bitmap = {"node": disk.chain.active.node.name, "name": "theirs"}
        await vm.monitor.execute("block-dirty-bitmap-add", bitmap)
        with pytest.raises(UnsupportedError, match="dirty bitmap theirs"):
            await disk.allocate(full=True)
        await vm.monitor.execute("block-dirty-bitmap-remove", bitmap)
        where = Ranges([(0, disk.size)])
        done, held, had = await reserve_by_staging(disk, where, slice_size=4 * MIB)
        assert (done, bool(had)) == (8 * MIB, False)
        assert held > 0
        assert (await disk.map()).holes().total == 0
    assert str(image) in libvirt.virsh("domblklist", "qed")
    assert made(vm_dir) == []
    libvirt.virsh("destroy", "qed")


async def test_qemu_dies_while_the_newest_data_is_in_the_overlay(libvirt, chain, qemu_binary):
    """A plain start has it all, from the overlay; that comes home when it is convenient."""
    told, layers = await killed(libvirt, chain, qemu_binary, FULL, "qemu", "commit", "before")
    assert told == "running"
    below = ["now.qcow2", "mid.qcow2", "top.qcow2", "base.qcow2"]
    assert layers[1:] == below
    assert {layers[0], f"{layers[0]}.journal"} == set(made(chain.parent))
    domain = f"{chain.parent.name}-qemu"
    libvirt.virsh("start", domain)
    code, out, err = await cli("recover", libvirt.address(domain))
    assert code == 0, err
    assert f"bring-home {chain.parent / layers[0]}" in out
    listed = libvirt.virsh("domblklist", domain), libvirt.virsh("domblklist", "--inactive", domain)
    assert all(Path(one.split()[1]) == chain for one in listed)
    assert made(chain.parent) == []
    assert (await cli("recover", libvirt.address(domain)))[1].startswith("nothing to recover")
    libvirt.virsh("destroy", domain)
    tools = Tools.of(qemu_binary)
    for pattern, where in ((99, 8192), (9, 12288), *((HELD[key], key[1]) for key in HELD)):
        run(tools.io, "-r", "-f", "qcow2", "-c", f"read -P {pattern} {where}k 64k", chain)
