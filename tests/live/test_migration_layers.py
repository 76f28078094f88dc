"""Of a chain the active layer alone goes over, onto an image over the very same backing image."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours, writes_on
from jsonschema import Draft202012Validator
from migrating import MIB, arrived, migrated, overlying, snapshot, stays, stressed

from qmpblock.errors import GraphError, UnsupportedError
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

SCHEMAS = {
    name: json.loads((Path(__file__).parents[2] / f"docs/schema/{name}.schema.json").read_text())
    for name in ("migrate", "migration-plan")
}
#: What the base holds shows through, but for zeros above it; past its end there is nothing.
CHAIN = (
    "about: A chain.\ndisks:\n  - {name: d0, images: [{size: 48M, content: [write 0 12M 0xaa]}, "
    "{size: 64M, content: [zero 8M 2M, write 10M 1M 0xbb, zero 48M 1M]}], "
    "attach: {device: DEVICE, iothread: THREAD, filters: [FILTERS]}}\n"
)


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to its disk, a chain of two images."""

    async def start(device="virtio-blk", iothread="none", filters="", **options):
        text = CHAIN.replace("DEVICE", device).replace("THREAD", iothread)
        text = text.replace("FILTERS", filters)
        tools = Tools.of(qemu_binary)
        built = await build(parse_scenario(text, "source"), vm_dir / "source", tools)
        return await stressed(await start_qemu(built, guest=True, **options), 100)

    return start


@pytest.fixture
def land(start_qemu, vm_dir, qemu_binary, invariant):
    """Give what starts a destination whose image lies on the source's own backing image."""

    async def start(source, *, backing=None, content="", named=True, **options):
        options = {"guest": True, "backing": backing, "content": content, "named": named, **options}
        vm = await overlying(start_qemu, source, vm_dir, Tools.of(qemu_binary), **options)
        invariant.forget(source)
        invariant.forget(vm)
        return vm

    return start


def held(vm):
    return vm.disks[0].active.path.stat().st_blocks * 512


async def whole(vm):
    """Return what the disk is, its backing image included. Its QEMU has ended."""
    active, tools = vm.disks[0].active, Tools.of(vm.command[0])
    raw = active.path.parent / "whole"
    await tools.run(tools.img, "convert", "-f", "qcow2", "-O", "raw", str(active.path), str(raw))
    data = raw.read_bytes()
    raw.unlink()
    return data


def as_it_was(data):
    assert data[: 8 * MIB] == b"\xaa" * (8 * MIB)
    assert data[8 * MIB : 10 * MIB] == bytes(2 * MIB)
    assert data[10 * MIB : 11 * MIB] == b"\xbb" * MIB
    assert data[11 * MIB : 12 * MIB] == b"\xaa" * MIB
    assert data[48 * MIB :] == bytes(16 * MIB)


@pytest.mark.parametrize(
    ("device", "iothread", "daemon"), [("virtio-blk", "none", False), ("virtio-scsi", "one", True)]
)
async def test_the_active_layer_alone(device, iothread, daemon, begin, land):
    """What the base holds shows through where the guest wrote nothing, and not where it did."""
    source = await begin(device, iothread)
    base = source.disks[0].active.backing.path
    before = base.read_bytes()
    destination = await land(source)
    result = await migrated(source, destination, layers="top", storage_daemon=daemon)
    assert result.disks[0].layers == "top"
    assert result.disks[0].copied < 48 * MIB  # of 64, and the guest writes on
    await arrived(source, destination, result)
    assert held(destination) < 8 * MIB
    as_it_was(await whole(destination))
    assert base.read_bytes() == before


async def test_over_a_copy_of_the_backing_image_on_the_users_word(begin, land, invariant, vm_dir):
    """It is not seen that both hold the same: so that has to be said."""
    source = await begin()
    base = source.disks[0].active.backing
    shutil.copy(base.path, vm_dir / "copied")
    destination = await land(source, backing=replace(base, path=vm_dir / "copied"))
    words = ("migrate", source.monitor_path, destination.monitor_path, "--layers", "top", "--json")
    code, out, _ = await cli(*words, "--dry-run")
    plan = json.loads(out)
    assert (code, plan["refused"]) == (2, True)
    assert [one["name"] for one in plan["findings"]] == ["backing-unproven"]
    code, out, err = await cli(*words)
    assert (code, out) == (2, "")
    assert "are not the same file" in err
    await stays(source, invariant)
    code, out, _ = await cli(*words, "--same-backing", "--dry-run")
    plan = json.loads(out)
    assert (code, plan["findings"]) == (0, [])
    Draft202012Validator(SCHEMAS["migration-plan"]).validate(plan)
    assert plan["disks"][0]["layers"] == "top"
    assert plan["disks"][0]["data"] < 8 * MIB
    code, out, err = await cli(*words, "--same-backing")
    assert code == 0, err
    said = json.loads(out)
    Draft202012Validator(SCHEMAS["migrate"]).validate(said)
    assert said["disks"][0]["layers"] == "top"
    await source.quit()
    guest = await destination.attach_guest()
    assert (await guest.stop_stress()).bad == 0
    assert await guest.check() > 0
    await destination.quit()
    as_it_was(await whole(destination))


async def test_an_image_that_holds_something_is_refused(begin, land, invariant):
    """It would stay where the active layer of the disk holds nothing."""
    source = await begin()
    destination = await land(source, content="write -P 0xcc 30M 64k")
    with pytest.raises(UnsupportedError, match="holds something itself"):
        await migrated(source, destination, layers="top")
    await stays(source, invariant)
    await nothing_of_ours(destination)


async def test_an_image_of_the_source_is_not_copied_to(begin, start_qemu, invariant):
    """The destination has the disk's own backing image for its disk."""
    source = await begin()
    disks = [replace(disk, active=disk.active.backing) for disk in source.disks]
    destination = await start_qemu(
        tuple(disks), machine=source.machine, incoming="defer", guest=True, extra=["-S"]
    )
    invariant.forget(destination)
    with pytest.raises(UnsupportedError, match="which a disk of the source is in"):
        await migrated(source, destination)
    await stays(source, invariant)


@pytest.mark.parametrize(
    ("filters", "layers", "why"),
    [
        ("throttle", "top", "somebody took a snapshot"),
        ("", "top", "has just been changed by somebody else"),
        ("", "all", "has just been changed by somebody else"),
    ],
)
async def test_the_active_layer_is_the_one_that_was_meant(
    filters, layers, why, begin, land, invariant, vm_dir, monkeypatch
):
    """Of a snapshot in the last moment, below a filter, QEMU copies that alone: no error (K46).

    Without one it refuses, and why it does, "Need a root block node", tells nobody what happened.
    """
    source = await begin(filters=filters)
    invariant.forget(source)  # it has another active layer in the end
    destination = await land(source)
    destination.expect_exit()
    execute, struck = Monitor.execute, []

    async def strike(self, command, *arguments):
        if command == "blockdev-mirror":
            struck.append(await snapshot(source, vm_dir))
        return await execute(self, command, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "execute", strike)
        with pytest.raises(GraphError, match=why):
            await migrated(source, destination, layers=layers)
    assert len(struck) == 1
    assert (await source.execute("query-status"))["status"] == "running"
    await writes_on(source.guest)
    await nothing_of_ours(source)
    assert await source.execute("query-jobs") == []
    end = await source.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    assert await source.guest.check() > 0
