"""Migrations by ssh in which a storage daemon over there has the destination's images."""

import asyncio
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from chains import cli
from disturbed import until
from jsonschema import Draft202012Validator
from migrating import (
    KEPT,
    MIB,
    arrived,
    at,
    carried,
    children_of,
    machine,
    migrated_to,
    stays,
    storage_daemons,
)

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.host.processes import command_line

pytestmark = pytest.mark.live

SCHEMA = Path(__file__).parents[2] / "docs/schema/migration-plan.schema.json"
PLAN = json.loads(SCHEMA.read_text())


@pytest.fixture
async def host(ssh_host):
    """Have destinations be started on one that `ssh` reaches."""
    return ssh_host


migrated = partial(migrated_to, storage_daemon=True)


def ours_beside(vm):
    return [path.name for path in vm.directory.iterdir() if path.name.endswith("-nbd")]


def runs(vm_dir):
    """Return the daemons themselves, not what started them."""
    pids = storage_daemons(vm_dir)
    return [pid for pid in pids if "qemu-storage-daemon" in command_line(pid)[0]]


async def gone(vm_dir, destination):
    await until(lambda: not storage_daemons(vm_dir), "the end of the daemon")
    assert ours_beside(destination) == []


@pytest.mark.parametrize("image", ["qcow2", "raw"])
async def test_it_serves_there(image, host, begin, land, vm_dir, monkeypatch):
    source = await begin(machine(2, image=image))
    destination = await land(source)
    seen = []

    async def look():
        seen.extend(runs(vm_dir))

    with at(monkeypatch, "ready", look):
        result = await migrated(host, source, destination)
    assert len(seen) == 1
    await arrived(source, destination, result)
    await gone(vm_dir, destination)


@pytest.mark.parametrize("phase", ["copying", "ready", "held"])
@pytest.mark.parametrize("who", ["daemon", "destination", "ssh", "wire"])
async def test_one_dies(who, phase, host, begin, land, invariant, vm_dir, monkeypatch):
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def strike():
        if who == "wire":
            host.set_wire(up=False)
        elif who == "destination":
            await destination.kill()
        elif who == "daemon":
            for pid in runs(vm_dir):
                os.kill(pid, signal.SIGKILL)
        else:
            [ssh] = [
                one
                for one in children_of(os.getpid())
                if "ClearAllForwardings=yes" in command_line(one)
            ]
            os.kill(ssh, signal.SIGKILL)

    with at(monkeypatch, phase, strike), pytest.raises(qmpblock.Error) as failed:
        await migrated(host, source, destination, stall=4)
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    # Whoever wants them has the very images that they were of; here there are new ones.
    assert (KEPT in str(failed.value)) == (who == "destination")
    if phase == "copying":  # it ends by itself, though sshd has noticed nothing yet
        await gone(vm_dir, destination)
    host.set_wire(up=True)
    await gone(vm_dir, destination)
    if who != "destination":
        await stays(source, invariant)
    if destination.running:
        await destination.kill()
    destination = await land(source)
    await arrived(source, destination, await migrated(host, source, destination))
    await gone(vm_dir, destination)


@pytest.fixture
def again(start_qemu, invariant, host, qemu_binary):
    """Give what starts a destination anew there, with the images of one that has ended."""

    async def start(source, destination):
        waiting = {"incoming": "defer", "extra": ["-S"], "guest": True, "machine": source.machine}
        qemu = host.program(qemu_binary)
        vm = await start_qemu(destination.disks, qemu=qemu, **waiting)
        invariant.forget(vm)
        return vm

    return start


@pytest.mark.parametrize("phase", ["ready", "memory", "active", "held"])
async def test_what_was_mirrored_is_not_mirrored_again(
    phase, host, begin, land, again, invariant, vm_dir, monkeypatch
):
    """The disks hold 8 MiB each, which the guest does not write to; it does elsewhere."""
    source = await begin(machine(2), rate=100)
    destination = await land(source)
    destination.expect_exit()
    invariant.forget(source)
    with at(monkeypatch, phase, destination.kill), pytest.raises(qmpblock.Error, match=KEPT):
        await migrated(host, source, destination)
    await gone(vm_dir, destination)
    before = [(await source.guest.progress(number)).issued for number in range(2)]
    destination = await again(source, destination)
    sent = carried(monkeypatch)
    result = await migrated_to(host, source, destination)  # without being asked for one
    assert [one.text for one in result.notices] == [
        "the disks' mirrors of an attempt before are gone on with"
    ]
    ends = await arrived(source, destination, result)
    written = [(end.issued - had) * 4096 for end, had in zip(ends, before, strict=True)]
    print(f"written since: {written}; over the wires: {sent}")
    for number, bound in enumerate(written):
        assert result.disks[number].copied <= bound + MIB // 2
        assert sent[number] <= bound * 1.02 + MIB


async def test_an_image_that_was_written_to_since_is_copied_anew(
    host, begin, land, again, invariant, monkeypatch
):
    source = await begin(machine(2), rate=100)
    destination = await land(source)
    destination.expect_exit()
    invariant.forget(source)
    with at(monkeypatch, "memory", destination.kill), pytest.raises(qmpblock.Error, match=KEPT):
        await migrated(host, source, destination)
    with destination.disks[0].active.path.open("r+b") as image:
        image.write(b"Q")  # as was there: of QFI\xfb
    destination = await again(source, destination)
    result = await migrated(host, source, destination)
    assert result.notices == ()
    assert min(disk.copied for disk in result.disks) >= 8 * MIB
    await arrived(source, destination, result)


def foreseen(host, source, destination):
    sides = source.monitor_path, host.address(destination)
    return ("migrate", *sides, "--dry-run", "--storage-daemon", "--json")


async def test_a_dry_run_starts_none(host, begin, land, invariant, vm_dir):
    source = await begin()
    destination = await land(source)
    await invariant.begin(source)
    code, out, err = await cli(*foreseen(host, source, destination))
    assert code == 0, err
    plan = json.loads(out)
    Draft202012Validator(PLAN).validate(plan)
    assert (plan["storage_daemon"], plan["warnings"]) == (True, [])
    await gone(vm_dir, destination)
    assert (await destination.execute("query-status"))["status"] == "inmigrate"
    await stays(source, invariant)


#: Starts what holds its stderr, as a ProxyJump of its own does that waits for a dead wire.
LINGERING = """#!/bin/sh
sleep {} </dev/null >/dev/null &
exec {} "$@"
"""


async def test_an_ssh_whose_own_way_lingers_holds_nobody_up(host, begin, land, vm_dir, monkeypatch):
    """Neither a guest that stands, nor the end; and it is ended with its ssh."""
    ssh, seconds = vm_dir / "bin" / "ssh", f"{60 + os.getpid() % 97}.{os.getpid()}"
    ssh.parent.mkdir()
    ssh.write_text(LINGERING.format(seconds, shutil.which("ssh")))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    source = await begin()
    destination = await land(source)
    result = await asyncio.wait_for(migrated(host, source, destination), 40)
    assert result.downtime < 10
    await arrived(source, destination, result)
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    assert [pid for pid in pids if command_line(pid) == ("sleep", seconds)] == []


async def test_the_controller_dies(host, begin, land, invariant, vm_dir):
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)
    sides = (source.monitor_path, host.address(destination))
    words = ("-m", "qmpblock", "migrate", *sides, "--storage-daemon", "--speed", "1M")
    process = await asyncio.create_subprocess_exec(sys.executable, *words)

    async def mirrors():
        return len(await source.execute("query-jobs")) == 2

    await until(mirrors, "mirrors")
    process.kill()
    await process.wait()
    await gone(vm_dir, destination)
    code, out, err = await cli("recover", *sides)
    assert code == 0, (out, err)
    await until(lambda: not destination.running, "the end of the destination")
    await stays(source, invariant)
    destination = await land(source)
    await arrived(source, destination, await migrated(host, source, destination))


async def test_what_is_not_seen_there_to_be_the_destinations_is_refused(
    host, begin, land, invariant, vm_dir
):
    """Another file by the image's name would be written over, and the guest find nothing there."""
    source = await begin()
    destination = await land(source)
    await invariant.begin(source)
    image = destination.disks[0].active.path
    moved = image.rename(image.with_name("moved"))
    image.write_bytes(b"another")
    with pytest.raises(UnsupportedError, match=r"no QEMU that waits there is seen to have .* open"):
        await migrated(host, source, destination)
    code, _, err = await cli(*foreseen(host, source, destination))
    assert (code, "is seen to have" in err) == (2, True), err
    assert image.read_bytes() == b"another"
    moved.rename(image)
    await gone(vm_dir, destination)
    await stays(source, invariant)


async def test_no_key_is_handed_on(host, begin, land, invariant, vm_dir):
    image = "{size: 64M, format: luks, secret: geheim, content: [write 0 20M 0xaa]}"
    source = await begin(f"about: A disk.\ndisks: [{{name: d0, images: [{image}]}}]\n")
    destination = await land(source)
    await invariant.begin(source)
    with pytest.raises(UnsupportedError, match="is encrypted, and by ssh no key is handed on"):
        await migrated(host, source, destination)
    await gone(vm_dir, destination)
    await stays(source, invariant)
