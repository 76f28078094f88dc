"""A monitor that Proxmox VE's daemons share: short turns, and nobody waits for us.

The VM is in Proxmox's shape, its disk in an iothread, and clients with its daemons' manners ask all
the time: a test fails where one of them is not answered within the time that Proxmox waits.
"""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import pytest
from proxmox import DISK, answered, arguments, daemons, monitor, started

import qmpblock
from qmpblock.allocation.plan import below
from qmpblock.errors import DisconnectedError, UnsupportedError
from qmpblock.inventory import listing
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

MIB = 1 << 20
CHAIN = """\
about: A chain of three.
images:
  - {size: 64M, content: [write 0 16M 0xaa]}
  - {content: [write 16M 64K 0xbb]}
  - {content: [write 17M 64K 0xcc]}
"""
STRESS = StressSpec(
    offset=8 * MIB, blocks=1024, block_size=4096, queue_depth=8, seed=7, flush_every=50
)


async def test_its_daemons_are_answered_while_we_work(start_qemu, vm_dir, qemu_binary, invariant):
    vm, _ = await started(start_qemu, vm_dir, qemu_binary, CHAIN, guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        plain = await disk.map()
    await vm.guest.stress(STRESS)
    with daemons(vm_dir) as both:
        async with qmpblock.connect(monitor(vm_dir)) as controller:
            disk = await controller.disk(DISK)
            quiet = (20 * MIB, 44 * MIB)
            with answered(both):
                assert (await disk.map()).clip(*quiet) == plain.clip(*quiet)
                assert len(await disk.layers()) == 3
            with answered(both):
                done = await disk.allocate()
            assert not below(await disk.map())
            assert await controller.jobs() == ()
            assert await controller.recover() == []
    assert done.allocated > 0
    end = await vm.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    assert await vm.guest.check() > 0


async def test_what_a_killed_one_left_is_removed_by_turns(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """Its descriptors too: they are the monitor's, whoever is connected to that."""
    vm, _ = await started(start_qemu, vm_dir, qemu_binary, CHAIN, guest=True)
    await vm.guest.stress(STRESS)
    words = ("allocate", monitor(vm_dir), DISK, "--speed", "64K")
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", *words), stderr=asyncio.subprocess.DEVNULL
    )
    with daemons(vm_dir):
        while not await vm.execute("query-block-exports"):
            await asyncio.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        await killed.wait()
        async with qmpblock.connect(monitor(vm_dir)) as controller:
            assert len(await controller.recover()) > 0
    assert await vm.execute("query-block-exports") == []
    end = await vm.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)


@pytest.mark.parametrize(
    "at", ["end", pytest.param("start", marks=pytest.mark.needs_qemu(">= 10.0", reason="views"))]
)
async def test_a_copy_for_who_keeps_proxmox_away_himself(
    at, start_qemu, vm_dir, qemu_binary, invariant
):
    """The moment in which the guest is held for it is one turn."""
    vm, built = await started(start_qemu, vm_dir, qemu_binary, CHAIN, guest=True)
    target = vm_dir / "copy.raw"
    await vm.guest.stress(STRESS)
    with daemons(vm_dir) as both:
        async with qmpblock.connect(monitor(vm_dir), unmanaged=True) as controller:
            disk = await controller.disk(DISK)
            with answered(both):
                async with controller.copy({disk: target}, at=at, format="raw"):
                    pass
    await check_but_for_the_guest(vm, built, target)


async def check_but_for_the_guest(vm, built, target):
    """See that a raw file is the disk, but for where the guest writes; ends the VM."""
    end = await vm.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    await vm.quit()
    active, whole = built.disks[0].active.path, target.with_suffix(".now")
    await built.tools.run(built.tools.img, "convert", "-O", "raw", active, whole)
    now, then = whole.read_bytes(), target.read_bytes()
    written = slice(STRESS.offset, STRESS.offset + STRESS.blocks * STRESS.block_size)
    assert now[: written.start] == then[: written.start]
    assert now[written.stop :] == then[written.stop :]


@pytest.mark.needs_qemu(">= 10.0", reason="a disk in an iothread is exported to others")
async def test_a_point_in_time_for_others(start_qemu, vm_dir, qemu_binary, invariant):
    """Its readers have connections of their own, whoever has the monitor."""
    vm, built = await started(start_qemu, vm_dir, qemu_binary, CHAIN, guest=True)
    tools, target = built.tools, vm_dir / "then"
    await vm.guest.stress(STRESS)
    with daemons(vm_dir) as both:
        async with qmpblock.connect(monitor(vm_dir), unmanaged=True) as controller:
            disk = await controller.disk(DISK)
            with answered(both):
                async with controller.point_in_time([disk]) as points:
                    uri = points[disk].uri
                    await tools.run(tools.img, "convert", "-f", "raw", "-O", "raw", uri, target)
    await check_but_for_the_guest(vm, built, target)


async def test_a_chain_is_not_changed_by_turns(start_qemu, vm_dir, qemu_binary, invariant):
    """Also if whoever asks for it tells Proxmox afterwards."""
    vm, _ = await started(start_qemu, vm_dir, qemu_binary, CHAIN)
    for unmanaged, words in ((False, "managed by Proxmox VE"), (True, "others have in between")):
        async with qmpblock.connect(monitor(vm_dir), unmanaged=unmanaged) as controller:
            disk = await controller.disk(DISK)
            before = disk.chain.shape
            for change in changes(disk, vm_dir):
                with pytest.raises(UnsupportedError, match=words) as caught:
                    await change()
                assert caught.value.standing == "nothing was touched"
            with pytest.raises(UnsupportedError, match="by turns"):
                await disk.keep_ahead(MIB)
            async with qmpblock.connect(vm.monitor_path) as other:
                for pair in ((controller, other), (other, controller)):
                    with pytest.raises(UnsupportedError, match="by turns"):
                        await entered(qmpblock.migrate(*pair))
            await disk.refresh()
            assert disk.chain.shape == before
    assert not (vm_dir / "overlay.qcow2").exists()


async def entered(context):
    async with context:
        pass


def changes(disk, directory):
    yield lambda: disk.snapshot(directory / "overlay.qcow2")
    yield lambda: entered(disk.commit())
    yield lambda: entered(disk.stream())
    yield lambda: disk.allocate(independent=True)
    yield lambda: disk.allocate(full=True)


async def test_another_vm_by_then(start_qemu, vm_dir, qemu_binary, invariant):
    """Stopped and started again between two turns: that is not the VM that was connected to."""
    first, built = await started(start_qemu, vm_dir, qemu_binary, CHAIN)
    async with qmpblock.connect(monitor(vm_dir)) as controller:
        await controller.monitor.execute("query-status")
        await first.quit()
        with pytest.raises(DisconnectedError, match="VM 104 has no monitor"):
            await controller.monitor.execute("query-status")
    second = await start_qemu([], extra=arguments(vm_dir, built))
    async with qmpblock.connect(monitor(vm_dir)) as controller:
        assert controller.monitor.peer_pid == second.pid
        Path(monitor(vm_dir)).rename(vm_dir / "old")
        await start_qemu([], extra=arguments(vm_dir))
        with pytest.raises(DisconnectedError, match="another QEMU answers"):
            await controller.monitor.execute("query-status")


async def test_whoever_stays_is_waited_for(start_qemu, vm_dir, qemu_binary, invariant):
    await started(start_qemu, vm_dir, qemu_binary, CHAIN)
    async with qmpblock.connect(monitor(vm_dir)) as controller:
        with socket.socket(socket.AF_UNIX) as holder:
            holder.connect(monitor(vm_dir))
            assert json.loads(holder.recv(4096))["QMP"]
            asked = asyncio.create_task(controller.disks())
            done, _ = await asyncio.wait([asked], timeout=0.3)
            assert not done
        assert [disk.name for disk in await asked] == [DISK]
        async with qmpblock.connect(monitor(vm_dir)) as second:  # who shares it can be we, too
            both = await asyncio.gather(controller.disks(), second.disks())
        assert [disk.name for disks in both for disk in disks] == [DISK, DISK]


async def test_it_is_told_as_an_address(start_qemu, vm_dir, qemu_binary, invariant, monkeypatch):
    vm, _ = await started(start_qemu, vm_dir, qemu_binary, CHAIN)
    every = listing.qemus
    monkeypatch.setattr(listing, "qemus", lambda: [one for one in every() if one.pid == vm.pid])
    shared = f"unix:{monitor(vm_dir)}"
    monkeypatch.setattr(listing, "find", only(shared, listing.find))
    [found] = await qmpblock.vms()
    assert (found.address, found.trouble, found.status) == (shared, "", "running")
    assert (found.manager.name, found.manager.vm) == ("Proxmox VE", "104")
    assert [device.name for device in found.devices] == [DISK]
    assert found.refused["snapshot"] == "qm snapshot 104 NAME"
    assert "allocate" not in found.refused


def only(address, find):
    """Have the harness's own monitors not be there, as none is beside Proxmox's."""

    async def found(qemu, monitor):
        one = await find(qemu, monitor)
        return one if str(one.address) == address else listing.Found(None, "is the harness's")

    return found
