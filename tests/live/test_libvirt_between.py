"""A snapshot that somebody takes by libvirt in the last moment before it is asked for something.

libvirt lends nobody a lock, so nothing keeps it from that; what comes of it is seen, or refused by
libvirt, and no write of the guest's is lost in the image that the domain is started from.
"""

import asyncio

import pytest
from libvirtdomain import Domain
from libvirthost import make_chain

import qmpblock
from qmpblock.errors import Error

pytestmark = pytest.mark.live

THEIRS = ("snapshot-create-as", "--disk-only", "--no-metadata", "theirs")


async def _commit(vm, disk, folder):
    async with disk.commit(base="@1"):
        pass


async def _copy(vm, disk, folder):
    async with vm.copy({disk: folder / "copy.qcow2"}, pivot=True, layers="top"):
        pass


async def _snapshot(vm, disk, folder):
    await disk.snapshot(folder / "over.qcow2")


async def _pull(vm, disk, folder):
    async with disk.stream():
        pass


async def _full(vm, disk, folder):
    await disk.allocate(full=True)


#: What is done, what libvirt is asked for then, why it fails, and the chain that it leaves.
CASES = {
    "commit": (_commit, "commit", "is not active", ["top.theirs", "top.qcow2", "base.qcow2"]),
    "copy": (_copy, "copy", "changed by somebody", ["top.theirs", "top.qcow2", "base.qcow2"]),
    "snapshot": (
        *(_snapshot, "snapshot", "somebody else has taken a snapshot"),
        ["over.qcow2", "top.theirs", "top.qcow2", "base.qcow2"],
    ),
    "pull": (_pull, "pull", "somebody else has taken a snapshot", ["top.theirs"]),
}


class Between:
    """A `Lender`, of which something is asked in between."""

    def __init__(self, lender, call, meanwhile):
        self._lender, self._call, self._meanwhile = lender, call, meanwhile

    def __getattr__(self, name):
        real = getattr(self._lender, name)

        async def asked(*words, **more):
            if name == self._call:
                await self._meanwhile()
            return await real(*words, **more)

        return asked


@pytest.mark.parametrize("case", CASES)
async def test_a_snapshot_in_between(case, libvirt, vm_dir, qemu_binary):
    do, call, why, chain = CASES[case]
    domain = Domain(libvirt, f"between-{case}", qemu_binary, make_chain(vm_dir, qemu_binary))
    domain.written |= {(0, 0): 1, (0, 1024): 2}
    domain.write(5, 8192)
    taken = []

    async def meanwhile():
        if not taken:
            taken.append(await asyncio.to_thread(domain.virsh, *THEIRS))
            domain.write(6, 8256)

    async with qmpblock.connect(domain.address) as vm:
        disk, through = await vm.disk("vda"), vm.monitor.through
        vm.monitor.through = lambda ask: through(lambda one: ask(Between(one, call, meanwhile)))
        with pytest.raises(Error, match=why):
            await do(vm, disk, vm_dir)
    assert taken
    domain.write(7, 8320)
    assert domain.chains() == (chain, chain[0])
    assert await domain.layers() == chain
    domain.end()
