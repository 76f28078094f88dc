"""A copy to which the guest goes over, under libvirt: libvirt's own, so that it knows.

The judge is libvirt, as in `test_libvirt_chains`. Who is killed in its midst: `test_libvirt_kills`,
and all of it in tests/soak.
"""

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import make_chain, run

from qmpblock.testing.images import Tools
from qmpblock.testing.whichqemu import version_of

pytestmark = pytest.mark.live

#: What libvirt is not asked for, and why.
REFUSED = {
    ("--resume",): "copies anew each time",
    ("--allocation", "full", "--format", "qcow2"): "host space",
}


@pytest.fixture
def chain(vm_dir, qemu_binary):
    return make_chain(vm_dir, qemu_binary)


@pytest.fixture
def second(vm_dir, qemu_binary):
    image = vm_dir / "second.qcow2"
    run(Tools.of(qemu_binary).img, "create", "-q", "-f", "qcow2", image, "16M")
    return image


async def moved(domain, *words):
    code, out, err = await cli("copy", "--pivot", domain.address, *words)
    assert code == 0, err
    assert "the active layer is now" in out
    return out


async def test_the_guest_goes_over_and_libvirt_knows(libvirt, chain, second, qemu_binary):
    """Two disks at once, then one as it lies on its backing image; libvirt goes on from there."""
    domain, folder = (
        Domain(libvirt, "over", qemu_binary, chain, second, iothread=True),
        chain.parent,
    )
    domain.written |= {(0, 0): 1, (0, 1024): 2}
    domain.write(5, 8192)
    domain.write(6, 8192, disk=1)
    one, two = folder / "one.qcow2", folder / "two.qcow2"
    for words, why in REFUSED.items():
        code, _, err = await cli("copy", "--pivot", domain.address, "vda", str(one), *words)
        assert code == 2, err
        assert why in err
    assert not one.exists()
    await moved(domain, f"vda={one}", f"vdb={two}")
    assert domain.chains() == (["one.qcow2"], "one.qcow2")
    assert domain.chains("vdb") == (["two.qcow2"], "two.qcow2")
    assert await domain.layers() == ["one.qcow2"]
    assert await domain.layers("vdb") == ["two.qcow2"]
    assert "running" in domain.virsh("domstate")
    domain.backs_up()
    chain.unlink()
    domain.write(7, 8320)
    domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "later")
    domain.write(8, 8384)
    out = await moved(domain, "vda", str(folder / "top.qcow2"), "--layers", "top", "--speed", "64M")
    assert f"{folder / 'one.later'} is stale" in out
    assert domain.chains() == (["top.qcow2", "one.qcow2"], "top.qcow2")
    assert await domain.layers() == ["top.qcow2", "one.qcow2"]
    domain.virsh("blockcommit", "vda", "--shallow", "--active", "--pivot")
    assert domain.chains() == (["one.qcow2"], "one.qcow2")
    if version_of(qemu_binary) < (11, 0, 0):  # libvirt 9.0 saves by `migrate` with `detach`, gone
        domain.virsh("save", str(folder / "saved"))
        libvirt.virsh("restore", str(folder / "saved"))
    domain.end()
    domain.virsh("start")
    raw = folder / "raw.raw"
    await moved(domain, "vda", str(raw), "--format", "raw", "--allocation", "full")
    assert raw.stat().st_blocks * 512 >= 16 << 20
    assert domain.chains() == (["raw.raw"], "raw.raw")
    assert "type='raw'" in domain.virsh("dumpxml", "--inactive")
    domain.write(9, 8448)
    domain.goes_on()
    domain.end()
