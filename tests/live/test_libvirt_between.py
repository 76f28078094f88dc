"""A snapshot that somebody takes by libvirt in the last moment before it is asked for something.

libvirt lends nobody a lock, so nothing keeps it from that; what comes of it is seen, or refused by
libvirt, and no write of the guest's is lost in the image that the domain is started from.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

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
    "full": (
        *(_full, "snapshot", "somebody else is at work"),
        ["OURS", "top.theirs", "top.qcow2", "base.qcow2"],
    ),
}
#: A controller that is killed when libvirt has taken the snapshot, and has done nothing since.
KILLED = """
import asyncio, json, os, subprocess, sys
import qmpblock
from test_libvirt_between import Between, CASES

async def main(case, address, folder, meanwhile):
    async def between():
        for words in json.loads(meanwhile):
            subprocess.run(words, check=True)

    async with qmpblock.connect(address) as vm:
        disk, through = await vm.disk("vda"), vm.monitor.through
        vm.monitor.through = lambda ask: through(
            lambda one: ask(Between(one, "snapshot", between, os._exit))
        )
        await CASES[case][0](vm, disk, __import__("pathlib").Path(folder))

asyncio.run(main(*sys.argv[1:]))
"""
DIED = 9


class Between:
    """A `Lender`, of which something is asked in between."""

    def __init__(self, lender, call, meanwhile, after=None):
        self._lender, self._call, self._meanwhile, self._after = lender, call, meanwhile, after

    def __getattr__(self, name):
        real = getattr(self._lender, name)

        async def asked(*words, **more):
            if name == self._call:
                await self._meanwhile()
            done = await real(*words, **more)
            if name == self._call and self._after is not None:
                self._after(DIED)
            return done

        return asked


def named(chain):
    """Return a chain in which the overlay of an allocation is called OURS."""
    return ["OURS" if "qmpblock-" in name else name for name in chain]


async def headers(domain):
    """Return what the headers of the disk's images name, the active layer's first."""
    async with qmpblock.connect(domain.address) as vm:
        layers = (await vm.disk("vda")).chain.layers
    return [Path(layer.node.backing_filename or "").name for layer in layers]


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
    now, later = domain.chains()
    assert (named(now), named([later])) == (chain, [chain[0]])
    assert named(await domain.layers()) == chain
    assert await headers(domain) == [*now[1:], ""]
    domain.end()


@pytest.mark.parametrize("case", ["snapshot", "full"])
async def test_a_controller_killed_in_between(case, libvirt, vm_dir, qemu_binary):
    """Before it has had its header name what libvirt put it on: whoever comes next does that."""
    _, _, _, chain = CASES[case]
    domain = Domain(libvirt, f"killed-{case}", qemu_binary, make_chain(vm_dir, qemu_binary))
    domain.written |= {(0, 0): 1, (0, 1024): 2}
    domain.write(5, 8192)
    virsh = [*libvirt.inside, "virsh", "-q", "-c", libvirt.uri]
    write = 'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P 6 8256k 64k"'
    meanwhile = [
        [*virsh, THEIRS[0], domain.name, *THEIRS[1:]],
        [*virsh, "qemu-monitor-command", domain.name, "--hmp", write],
    ]
    words = [case, domain.address, str(vm_dir), json.dumps(meanwhile)]
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    paths = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    died = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, *words), env=os.environ | {"PYTHONPATH": paths}
    )
    assert await died.wait() == DIED
    domain.written[0, 8256] = 6
    assert (await headers(domain))[0] == "top.qcow2"  # past theirs
    async with qmpblock.connect(domain.address) as vm:
        told = await vm.recover(dry_run=True)
        verbs = {step.verb for one in told for step in one.steps}
        assert "agree" in verbs or "name-below" in verbs  # what comes next is to be seen by then
        assert (await headers(domain))[0] == "top.qcow2"
        done = await vm.recover()
        assert [step.verb for one in done for step in one.steps].count("name-below") == 1
        assert await vm.recover() == []
    domain.write(7, 8320)
    now, later = domain.chains()
    assert (named(now), named([later])) == (chain, [chain[0]])
    assert named(await domain.layers()) == chain
    assert await headers(domain) == [*now[1:], ""]
    domain.end()
