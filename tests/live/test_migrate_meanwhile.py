"""What somebody else does while a guest goes over: it is noticed, or does no harm."""

import pytest
from disturbed import nothing_of_ours, writes_on
from migrating import arrived, at, machine, migrated, snapshot, stressed

from qmpblock.errors import BusyError, CommandError, GraphError, UnsupportedError
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

CD = "driver=raw,node-name=cd,read-only=on,file.driver=file,file.filename="
PLUGGED = {"driver": "virtio-rng-pci", "id": "rng7", "addr": "1c"}


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to its disk."""

    async def start(filters="", **options):
        text = machine().replace("iothread: none", f"iothread: none, filters: [{filters}]")
        assert filters in text
        tools = Tools.of(qemu_binary)
        built = await build(parse_scenario(text, "source"), vm_dir / "source", tools)
        return await stressed(await start_qemu(built, guest=True, **options), 100)

    return start


async def goes_on(source):
    """See that the guest does, at the source, with all that it wrote."""
    assert (await source.execute("query-status"))["status"] == "running"
    await writes_on(source.guest)
    await nothing_of_ours(source)
    end = await source.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    assert await source.guest.check() > 0


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("memory", "theirs.qcow2.* is .*d0-0.qcow2 at the destination"),
        ("active", "d0 is another one now: somebody took a snapshot"),
    ],
)
async def test_a_snapshot_of_a_disk_that_both_have(
    phase, said, begin, start_destination, vm_dir, invariant, monkeypatch
):
    """What the guest writes from then on is in an overlay that the destination has not."""
    source = await begin()
    invariant.forget(source)  # it has another active layer in the end
    destination = await start_destination(source, shared=True)
    destination.expect_exit()
    with (
        at(monkeypatch, phase, lambda: snapshot(source, vm_dir)),
        pytest.raises((GraphError, UnsupportedError), match=said),
    ):
        await migrated(source, destination, memory_only=True)
    await goes_on(source)


@pytest.mark.parametrize("phase", ["copying", "active"])
async def test_a_snapshot_of_a_disk_whose_bitmap_goes_along(
    phase, begin, start_destination, vm_dir, invariant, monkeypatch
):
    """Below a throttle it can be taken under the mirror, and the bitmap stands still then."""
    source = await begin("throttle")
    invariant.forget(source)
    await source.execute("block-dirty-bitmap-add", node="d0", name="theirs")
    destination = await start_destination(source)
    destination.expect_exit()
    with (
        at(monkeypatch, phase, lambda: snapshot(source, vm_dir)),
        pytest.raises(GraphError, match="somebody took a snapshot"),
    ):
        await migrated(source, destination)
    await goes_on(source)


async def test_a_snapshot_of_a_disk_that_is_copied_whole(
    begin, start_destination, vm_dir, invariant, monkeypatch
):
    """The mirror is above the throttle, and copies whatever the guest writes."""
    source = await begin("throttle")
    invariant.forget(source)
    destination = await start_destination(source)
    with at(monkeypatch, "copying", lambda: snapshot(source, vm_dir)):
        result = await migrated(source, destination)
    await arrived(source, destination, result)


async def test_a_medium_that_is_taken_out_while_the_disks_are_copied(
    begin, start_destination, vm_dir, qemu_binary, monkeypatch
):
    tools, medium = Tools.of(qemu_binary), vm_dir / "cd.raw"
    await tools.run(tools.img, "create", "-q", "-f", "raw", str(medium), "1M")
    extra = ["-blockdev", f"{CD}{medium}", "-device", "ide-cd,id=cd0,drive=cd"]
    source = await begin(extra=extra)
    destination = await start_destination(source, extra=extra)

    async def eject():
        await source.execute("blockdev-open-tray", id="cd0", force=True)
        await source.execute("blockdev-remove-medium", id="cd0")

    with (
        at(monkeypatch, "copying", eject),
        pytest.raises(UnsupportedError, match="medium"),
    ):
        await migrated(source, destination)
    await goes_on(source)


@pytest.fixture
def begin_with_drive(begin, vm_dir, qemu_binary):
    """Give what starts a source with a medium in a drive; returns it, and what a destination has.

    It has a drive, too, of which QEMU knows by an old -drive, and one that is empty.
    """

    async def start():
        tools, medium = Tools.of(qemu_binary), vm_dir / "cd.raw"
        await tools.run(tools.img, "create", "-q", "-f", "raw", str(medium), "1M")
        extra = ["-blockdev", f"{CD}{medium}", "-device", "ide-cd,id=cd0,drive=cd,bus=ide.0,unit=0"]
        extra += ["-drive", f"if=none,id=old,format=raw,readonly=on,file={medium}"]
        extra += ["-device", "ide-cd,drive=old,bus=ide.0,unit=1"]
        extra += ["-device", "ide-cd,id=none,bus=ide.1,unit=0"]
        return await begin(extra=extra), extra

    return start


@pytest.mark.parametrize("drive", ["cd0", "old", "none"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_medium_that_is_exchanged_while_the_memory_is_sent(
    side, drive, begin_with_drive, start_destination, vm_dir, monkeypatch
):
    source, extra = await begin_with_drive()
    destination = await start_destination(source, extra=extra)
    destination.expect_exit()
    vm = source if side == "source" else destination

    async def exchange():
        if drive == "none":
            await vm.execute("blockdev-change-medium", id="none", filename=str(vm_dir / "cd.raw"))
        else:
            drawer = {"id": "cd0"} if drive == "cd0" else {"device": "old"}
            await vm.execute("eject", force=True, **drawer)

    with (
        at(monkeypatch, "active", exchange),
        pytest.raises(BusyError, match=f"changed the {side}: the medium of .* was") as failed,
    ):
        await migrated(source, destination)
    assert "the guest runs at the source" in failed.value.standing
    await goes_on(source)


async def test_a_tray_that_is_opened_is_the_guests(
    begin_with_drive, start_destination, monkeypatch
):
    source, extra = await begin_with_drive()
    destination = await start_destination(source, extra=extra)

    async def open_it():
        await source.execute("blockdev-open-tray", id="cd0", force=True)

    with at(monkeypatch, "active", open_it):
        result = await migrated(source, destination)
    await arrived(source, destination, result)


async def test_a_device_that_is_plugged_in_at_the_destination_while_the_memory_is_sent(
    begin, start_destination, monkeypatch
):
    source = await begin()
    destination = await start_destination(source)
    destination.expect_exit()
    with (
        at(monkeypatch, "active", lambda: destination.execute("device_add", **PLUGGED)),
        pytest.raises(BusyError, match="virtio-rng-pci rng7 was plugged in"),
    ):
        await migrated(source, destination)
    await goes_on(source)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_device_that_is_plugged_in_while_the_disks_are_copied(
    side, begin, start_destination, monkeypatch
):
    source = await begin()
    destination = await start_destination(source)
    vm = source if side == "source" else destination
    with (
        at(monkeypatch, "copying", lambda: vm.execute("device_add", **PLUGGED)),
        pytest.raises(UnsupportedError, match="rng7"),
    ):
        await migrated(source, destination)
    await goes_on(source)


async def test_a_source_that_sends_its_memory_plugs_in_nothing(
    begin, start_destination, monkeypatch
):
    source = await begin()
    destination = await start_destination(source)
    refused = []

    async def plug():
        with pytest.raises(CommandError, match="not allowed while migrating") as error:
            await source.execute("device_add", **PLUGGED)
        refused.append(error.value)

    with at(monkeypatch, "active", plug):
        await arrived(source, destination, await migrated(source, destination))
    assert len(refused) == 1
