"""A commit under libvirt: libvirt's own, around which we see to what it does not.

The judge is libvirt, as in `test_libvirt_chains`.
"""

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirtpoints import ACTIVE, HELD, killed, make_four

from qmpblock.testing.whichqemu import version_of

pytestmark = pytest.mark.live


@pytest.fixture
def chain(vm_dir, qemu_binary):
    return make_four(vm_dir, qemu_binary)


async def test_a_commit_is_libvirts_own(libvirt, chain, qemu_binary):
    """Of middle layers, then of the active one; libvirt goes on from there."""
    domain = Domain(libvirt, "shorter", qemu_binary, chain, iothread=True)
    domain.written |= HELD
    domain.write(5, 8192)
    code, out, err = await cli("commit", domain.address, "vda", "--top", "@1", "--base", "@2")
    assert code == 0, err
    assert "no longer in the chain" in out
    assert domain.chains() == (["now.qcow2", "top.qcow2", "base.qcow2"], "now.qcow2")
    assert await domain.layers() == ["now.qcow2", "top.qcow2", "base.qcow2"]
    domain.backs_up()
    (chain.parent / "mid.qcow2").unlink()
    domain.write(6, 8256)
    code, out, err = await cli("commit", domain.address, "vda", "--base", "@1")
    assert code == 0, err
    assert f"the active layer is now {chain.parent / 'top.qcow2'}" in out
    assert domain.chains() == (["top.qcow2", "base.qcow2"], "top.qcow2")
    assert await domain.layers() == ["top.qcow2", "base.qcow2"]
    assert "running" in domain.virsh("domstate")
    chain.unlink()
    domain.write(7, 8320)
    folder = chain.parent
    domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata")
    domain.write(8, 8384)
    domain.virsh("blockcommit", "vda", "--shallow", "--active", "--pivot")
    assert domain.chains() == (["top.qcow2", "base.qcow2"], "top.qcow2")
    if version_of(qemu_binary) < (11, 0, 0):  # libvirt 9.0 saves by `migrate` with `detach`, gone
        domain.virsh("save", str(folder / "saved"))
        libvirt.virsh("restore", str(folder / "saved"))
    domain.end()
    domain.virsh("start")
    code, _, err = await cli("commit", domain.address, "vda")
    assert code == 0, err
    assert domain.chains() == (["base.qcow2"], "base.qcow2")
    domain.goes_on()
    domain.end()


@pytest.mark.parametrize("victim", ["qemu", "daemon"])
async def test_somebody_is_killed_as_the_guest_moves(victim, libvirt, chain, qemu_binary):
    """The VM is paused then, so that either image has it all, and goes on when they agree."""
    told, _ = await killed(libvirt, chain, qemu_binary, ACTIVE, victim, "pivot", "after")
    assert told == "paused"
