"""Migrations that are broken off in any phase: the guest stays, and the next one works."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest
from disturbed import locks, nothing_of_ours
from migrating import arrived, at, both, machine, migrated, stays, stressed

import qmpblock
from qmpblock.copying import wire as wire_module
from qmpblock.errors import DisconnectedError, JobError
from qmpblock.migration import outward
from qmpblock.migration.journal import journals
from qmpblock.migration.landing import Landing
from qmpblock.testing import Tools, build, inject, parse_scenario

pytestmark = pytest.mark.live

#: Those in which it can be broken off, in their order; `active`: in the middle of `memory`.
PHASES = ("mirroring", "ready", "memory", "active", "held", "ended", "sent", "landed")
SPOILT = PHASES[3:]  # from here on a destination that lives is ended


class BrokenOffError(Exception):
    """What a test raises in the middle."""


async def ended(vm):
    async with asyncio.timeout(120):
        while vm.running:
            await asyncio.sleep(0.02)


async def again(source, start_destination, tools=None):
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.parametrize("how", ["error", "cancelled"])
@pytest.mark.parametrize("phase", PHASES)
async def test_broken_off(phase, how, begin, start_destination, invariant, monkeypatch):
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def breaking():
        if how == "error":
            raise BrokenOffError
        running.cancel()
        await asyncio.sleep(10)

    with at(monkeypatch, phase, breaking):
        running = asyncio.create_task(migrated(source, destination))
        with pytest.raises((BrokenOffError, asyncio.CancelledError)):
            await running
    await stays(source, invariant)
    if phase in SPOILT:
        await ended(destination)
        destination = None
    else:
        await nothing_of_ours(destination)
        assert (await destination.execute("query-status"))["status"] == "inmigrate"
    destination = destination or await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_destination_dies(
    phase, device, begin, start_destination, invariant, monkeypatch
):
    source = await begin(machine(2, device=device))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def killing():
        await destination.kill()

    with at(monkeypatch, phase, killing), pytest.raises(qmpblock.Error) as failed:
        await migrated(source, destination)
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)


async def test_a_disk_cannot_be_read(start_qemu, start_destination, vm_dir, qemu_binary, invariant):
    """On 7.2 a mirror does not end by itself for it: that may not be while QEMU flushes (K34)."""
    tools = Tools.of(qemu_binary)
    built = await build(parse_scenario(machine(image="raw"), "source"), vm_dir / "images", tools)
    spoilt = inject(built.disks[0], "read_aio", "EIO", offset=4 << 20)
    source = await stressed(await start_qemu(replace(built, disks=(spoilt,)), guest=True))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)
    with source.control.subscribe("BLOCK_JOB_ERROR") as failures:
        with pytest.raises(JobError, match="an image, failed a request"):
            await migrated(source, destination)
        actions = {event["data"]["action"] for event in failures.pending()}
    assert actions == {"stop" if source.version < (8,) else "report"}
    await stays(source, invariant)


@pytest.mark.parametrize("phase", ["mirroring", "held"])
async def test_the_source_ends(phase, begin, start_destination, monkeypatch):
    """As it does by itself where its guest shuts down: there is nothing to be recovered."""
    source = await begin(machine(1))
    source.expect_exit()
    destination = await start_destination(source)
    destination.expect_exit()

    async def killing():
        await source.kill()

    with at(monkeypatch, phase, killing), pytest.raises(DisconnectedError) as failed:
        await migrated(source, destination)
    assert "QEMU has ended, and its images lack nothing" in failed.value.standing
    assert "unless the guest shut itself down, start it again" in failed.value.remedy
    assert not [one for one in journals() if one.record.source.pid == source.pid]
    if phase in SPOILT:
        await ended(destination)
    else:
        assert "the destination waits as before" in failed.value.standing
        await nothing_of_ours(destination)


@pytest.mark.parametrize("phase", PHASES)
async def test_the_destination_falls_silent(
    phase, begin, start_destination, invariant, monkeypatch
):
    monkeypatch.setattr(outward, "STANDSTILL", 3.0)
    monkeypatch.setattr(wire_module, "HOLD", 2.0)
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def stopping():
        os.kill(destination.pid, signal.SIGSTOP)

    asked, answers = [], Landing.answers

    async def seen(landing):
        asked.append((await source.execute("query-status"))["status"])
        return await answers(landing)

    monkeypatch.setattr(Landing, "answers", seen)
    with at(monkeypatch, phase, stopping), pytest.raises(qmpblock.Error) as failed:
        async with both(source, destination, stall=4) as vms, qmpblock.migrate(*vms):
            pass
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    if phase != "landed":
        assert set(asked) == {"running"}, "the guest stood while the destination was asked"
    if phase == "landed":
        assert "see that it is ended, and never continue it" in str(failed.value)
        [left] = await locks(source)  # as long as that is not known to have ended
        assert left.endswith("-handover")
        await source.execute("object-del", id=left)
    await stays(source, invariant)
    os.kill(destination.pid, signal.SIGCONT)
    await destination.kill()
    await again(source, start_destination)


@pytest.mark.parametrize("phase", ["active", "held", "sent", "landed"])
async def test_the_memory_alone_is_broken_off(
    phase, begin, start_destination, invariant, monkeypatch
):
    source = await begin()
    destination = await start_destination(source, shared=True)
    destination.expect_exit()
    await invariant.begin(source)

    async def breaking():
        raise BrokenOffError

    with at(monkeypatch, phase, breaking), pytest.raises(BrokenOffError):
        await migrated(source, destination, memory_only=True)
    await stays(source, invariant)
    await ended(destination)
    destination = await start_destination(source, shared=True)
    result = await migrated(source, destination, memory_only=True)
    await arrived(source, destination, result)
