"""Migrations of disks drawn by chance, and broken off again and again: `make soak`."""

import asyncio

import pytest
from migrating import arrived, machine, migrated, stressed, to_newer
from migrationrounds import migrations_under_stress
from rounds import rounds

from qmpblock.testing import Tools, build, parse_scenario

pytestmark = [pytest.mark.live, pytest.mark.soak]


async def test_any_disks_go_over(start_qemu, start_destination, vm_dir, qemu_binary, qemu_version):
    count, chance = rounds(100)
    where = (start_qemu, start_destination, vm_dir, qemu_binary, qemu_version)
    print(await migrations_under_stress(*where, chance, count))


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
async def test_any_disks_go_over_to_a_newer_qemu(
    start_qemu, start_destination, vm_dir, qemu_binary, qemu_version
):
    count, chance = rounds(50)
    where = (start_qemu, start_destination, vm_dir, qemu_binary, qemu_version)
    print(await migrations_under_stress(*where, chance, count, **to_newer()))


async def test_broken_off_at_any_moment_then_made(
    start_qemu, start_destination, vm_dir, qemu_binary
):
    count, chance = rounds(100)
    text = machine(2, device=chance.choice(["virtio-blk", "virtio-scsi"]))
    built = await build(parse_scenario(text, "source"), vm_dir / "source", Tools.of(qemu_binary))
    source = await stressed(await start_qemu(built, guest=True))
    over, destination = 0, await start_destination(source)
    for _ in range(count):
        destination.expect_exit()
        running = asyncio.create_task(migrated(source, destination))
        await asyncio.wait({running}, timeout=chance.uniform(0, 0.5))
        if chance.random() < 0.3:
            await destination.kill()
        running.cancel()
        await asyncio.wait({running})
        if (await source.execute("query-status"))["status"] == "postmigrate":
            over += 1  # it was faster: the guest is there, if that was not killed
            break
        assert (await source.execute("query-status"))["status"] == "running"
        assert await source.execute("query-jobs") == []
        done = await source.guest.progress()
        assert (done.bad, done.errors) == (0, 0)
        if (
            destination.running
            and (await destination.execute("query-status"))["status"] == "inmigrate"
        ):
            continue
        await destination.close()
        destination = await start_destination(source)
    print(f"{count} rounds, {over} went over")
    if not over:
        await arrived(source, destination, await migrated(source, destination))
