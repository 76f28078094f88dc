"""The wire between two VMs, measured before anything is copied: how fast, how far, nothing left."""

import asyncio
import os
import signal
import sys

import pytest
from chains import cli
from disturbed import nothing_of_ours
from migrating import both, machine, slow_wire, stressed

from qmpblock.errors import BusyError, Error
from qmpblock.migration.wirespeed import measure_wire
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
CONTROLLER = """\
import asyncio, os, signal, sys
import qmpblock
from qmpblock.migration import wirespeed

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(wirespeed, sys.argv[3], die)

async def main():
    async with qmpblock.connect(sys.argv[1]) as one, qmpblock.connect(sys.argv[2]) as other:
        await wirespeed.measure_wire(one, other)

asyncio.run(main())
"""


@pytest.fixture
def pair(start_qemu, vm_dir, qemu_binary, start_destination, invariant):
    """Return what starts a pair that must be, afterwards, as it was."""

    async def start(**options):
        built = await build(
            parse_scenario(machine(2, **options), "source"),
            vm_dir / "source",
            Tools.of(qemu_binary),
        )
        source = await stressed(await start_qemu(built, guest=True))
        destination = await start_destination(source)
        await invariant.begin(source)
        await invariant.begin(destination)
        return source, destination

    return start


async def as_before(vm, invariant):
    await nothing_of_ours(vm)
    await invariant.verify(vm)


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_it_is_measured_and_nothing_is_left(pair, invariant, device):
    source, destination = await pair(device=device, iothread="one")
    async with both(source, destination) as vms:
        found = await measure_wire(*vms)
    print(found)
    assert found.rate > 12 * MIB
    said = [line for line in destination.qmp_log() if "block-export-add" in line]
    assert len(said) == 1
    assert "-null" in said[0]
    assert 0 < found.latency < 1
    for vm in (source, destination):
        await as_before(vm, invariant)
    assert (await source.guest.stop_stress(0)).errors == 0


@pytest.mark.parametrize("rate", [2, 12])
async def test_a_slow_wire_is_found_to_be_slow(pair, invariant, monkeypatch, rate):
    source, destination = await pair()
    loop = asyncio.get_running_loop()
    async with slow_wire(monkeypatch, rate * MIB), both(source, destination) as vms:
        began = loop.time()
        found = await measure_wire(*vms)
        took = loop.time() - began
    print(found, took)
    assert 0.1 * rate * MIB < found.rate < 1.4 * rate * MIB
    assert took < 60
    for vm in (source, destination):
        await as_before(vm, invariant)


async def test_a_wire_that_is_long_is_found_to_be_long(pair, monkeypatch):
    source, destination = await pair()
    async with slow_wire(monkeypatch, 1 << 40, 0.02), both(source, destination) as vms:
        found = await measure_wire(*vms)
    assert 0.035 < found.latency < 0.2  # 0.04 there and back, by the clocks of those between


async def test_a_destination_that_falls_silent_holds_nobody(pair, invariant):
    source, destination = await pair()
    async with both(source, destination, stall=3) as vms:
        os.kill(destination.pid, signal.SIGSTOP)
        with pytest.raises(Error):
            await measure_wire(*vms)
        os.kill(destination.pid, signal.SIGCONT)
    await as_before(source, invariant)


@pytest.mark.parametrize("where", ["_measured", "_end", "_leave"])
async def test_after_kill_9_whoever_comes_next_takes_it_away(pair, invariant, where):
    source, destination = await pair()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CONTROLLER, source.monitor_path, destination.monitor_path, where)
    )
    assert await process.wait() == -signal.SIGKILL
    async with both(source, destination) as vms:
        found = await measure_wire(*vms)
    assert found.rate > 0
    for vm in (source, destination):
        await as_before(vm, invariant)


async def test_after_kill_9_a_recovery_takes_it_away(pair, invariant):
    source, destination = await pair()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CONTROLLER, source.monitor_path, destination.monitor_path, "_end")
    )
    assert await process.wait() == -signal.SIGKILL
    code, _, err = await cli("recover", source.monitor_path)
    assert code == 0, err
    await nothing_of_ours(source)
    async with both(source, destination) as vms:  # one that waits for a guest is not recovered
        await measure_wire(*vms)
    for vm in (source, destination):
        await as_before(vm, invariant)


async def test_two_at_once_do_not_meet(pair, invariant):
    source, destination = await pair()
    async with both(source, destination) as vms:
        every = [measure_wire(*vms) for _ in range(2)]
        found = await asyncio.gather(*every, return_exceptions=True)
    assert any(isinstance(one, BusyError) for one in found)
    for vm in (source, destination):
        await as_before(vm, invariant)
