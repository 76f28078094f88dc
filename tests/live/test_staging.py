"""The staged commit, disturbed: writes at the worst moments, interrupts, full file systems."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from allocating import at_command, blank, content
from chains import cli
from disturbed import nothing_of_ours
from jsonschema import Draft202012Validator
from rounds import rounds

import qmpblock
from qmpblock.allocation import staged as staging
from qmpblock.errors import Error, JobError
from qmpblock.speed import Speed
from qmpblock.testing import faults
from qmpblock.testing.images import Tools, build
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
MIB = 1 << 20
AT = 8 * MIB  # where nothing is
PLACES = 48  # of a MiB each, from there on
STRESS = StressSpec(
    offset=AT, blocks=2048, block_size=4096, queue_depth=8, seed=5, flush_every=50, read_percent=20
)


def valid(value, name):
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    return value


async def one_disk(start_qemu, vm_dir, qemu_binary, scenario=None, **options):
    built = await build(scenario or blank(), vm_dir / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    vm = await start_qemu(built, guest=True, **options)
    return vm, built, bytearray(before)


async def holds(vm, built, expected):
    """End the VM; its image holds exactly this, and is sound."""
    await nothing_of_ours(vm)
    await vm.quit()
    active = built.disks[0].active
    found = await content(active, built.tools)
    assert found == bytes(expected)
    await active.check(built.tools)


def writing_before_the_freeze(monkeypatch, vm, at, length, byte):
    """Have the guest write between the plan and the freeze, the latest moment there is."""
    real = staging.owner_of

    async def owner_of(*arguments):
        owner = await real(*arguments)
        taken = owner.take

        async def take(items):
            await vm.guest.fill(0, at, length, byte)
            await taken(items)

        owner.take = take
        return owner

    monkeypatch.setattr(staging, "owner_of", owner_of)


async def test_a_write_between_plan_and_freeze_is_kept(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    writing_before_the_freeze(monkeypatch, vm, AT + MIB, 2 * MIB, 0x77)
    expected[AT + MIB : AT + 3 * MIB] = b"\x77" * (2 * MIB)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(AT, 8 * MIB, full=True)
        assert result.reserved == 6 * MIB
    await holds(vm, built, expected)


async def test_a_map_from_before_the_freeze_would_lose_it(
    start_qemu, vm_dir, qemu_binary, monkeypatch
):
    """So the test above can fail: with the ranges chosen on the live disk, the write is gone."""
    vm, built, _ = await one_disk(start_qemu, vm_dir, qemu_binary)
    writing_before_the_freeze(monkeypatch, vm, AT + MIB, 2 * MIB, 0x77)
    early = []

    async def plan(disk, where):
        early.append((await disk.map(AT, 8 * MIB)).holes() & where)
        return early[0]

    async def choose(disk, *_):
        await disk.refresh()
        return early[0], True

    monkeypatch.setattr(staging, "_blank", plan)
    monkeypatch.setattr(staging, "_choose", choose)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await disk.allocate(AT, 8 * MIB, full=True)
    await vm.quit()
    found = await content(built.disks[0].active, built.tools)
    assert found[AT + MIB : AT + 3 * MIB] == bytes(2 * MIB)


async def was_cancelled(work):
    """Whether a task ended by being cancelled; its error, if it has one, is raised."""
    await asyncio.wait([work])
    if work.cancelled():
        return True
    work.result()
    return False


async def blank_again(vm):
    """Have the guest give back what was reserved, between two stress runs."""
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await vm.guest.discard(0, AT, PLACES * MIB)
    await vm.guest.stress(STRESS)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_interrupt_at_any_command_brings_the_overlay_home(
    moment, start_qemu, vm_dir, qemu_binary, invariant
):
    """As Ctrl-C does, while the guest writes to what is reserved; in soak at every command."""
    stride = 1 if os.environ.get("QMPBLOCK_SOAK") else 14
    _, chance = rounds(1)
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await vm.guest.stress(STRESS)
        number, interrupted = 0, True
        while interrupted:
            number += chance.randint(1, stride)
            place = number % PLACES
            if place == 0:
                await blank_again(vm)
            work = asyncio.ensure_future(disk.allocate(AT + place * MIB, MIB, full=True))
            with at_command(controller.monitor, number, work.cancel, moment) as trace:
                interrupted = await was_cancelled(work)
            assert "stop" not in trace
            await disk.refresh()
            assert [layer.node.name for layer in disk.chain.layers] == ["d0", "d0-1"], trace
            assert disk.device.jobs == (), trace
            await nothing_of_ours(vm)
        assert number > 60
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await vm.quit()
    found = await content(built.disks[0].active, built.tools)
    area = slice(STRESS.offset, STRESS.offset + STRESS.length)
    verdict = check_acknowledged(found[area], STRESS, done.acked, done.issued)
    assert verdict.ok, verdict
    assert found[: area.start] == expected[: area.start]
    assert found[area.stop :] == expected[area.stop :]
    await built.disks[0].active.check(built.tools)


# -- no room


async def on_a_small_file_system(start_qemu, directory, qemu_binary):
    built = await build(blank(), directory / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    return await start_qemu(built, guest=True), built, before


async def test_no_room_is_noticed_beforehand(start_qemu, vm_dir, qemu_binary, invariant):
    async with faults.small_file_system(vm_dir / "small", 96 * MIB) as directory:
        vm, built, before = await on_a_small_file_system(start_qemu, directory, qemu_binary)
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with pytest.raises(Error, match="bytes free") as caught:
                await disk.allocate(AT, 32 * MIB, full=True)
            assert "nothing of ours is left" in caught.value.standing
            assert (await disk.map(AT, 32 * MIB)).holes().total == 32 * MIB
        await holds(vm, built, before)


@pytest.mark.parametrize("command", ["blockdev-reopen", "block-commit"])
async def test_a_full_file_system_in_the_middle(
    command, start_qemu, vm_dir, qemu_binary, invariant
):
    """Somebody else takes the room: the overlay comes home first, then it is said."""
    async with faults.small_file_system(vm_dir / "small", 160 * MIB) as directory:
        vm, built, before = await on_a_small_file_system(start_qemu, directory, qemu_binary)
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()

            def fill():
                faults.fill_up(directory, leave=4 * MIB)

            with (
                at_command(controller.monitor, command, fill) as trace,
                pytest.raises(JobError, match="No space left") as caught,
            ):
                await disk.allocate(AT, 32 * MIB, full=True)
            assert "nothing of ours is left" in caught.value.standing
            assert trace.count("blockdev-reopen") == 3, "it lies on the image itself again"
            await disk.refresh()
            assert [layer.node.name for layer in disk.chain.layers] == ["d0", "d0-1"]
            await vm.guest.fill(0, 1 * MIB, 4096, 0x11)  # the guest is as free as before
            (directory / "filler").unlink()
            result = await disk.allocate(AT, 32 * MIB, full=True)
            assert 0 < result.reserved <= 32 * MIB
        expected = bytearray(before)
        expected[MIB : MIB + 4096] = b"\x11" * 4096
        await holds(vm, built, expected)


# -- options


async def test_the_overlay_is_opened_like_the_image(vm_dir, qemu_binary):
    """Were its aio another one, the guest would notice for as long as it writes there."""
    built = await build(blank(), vm_dir / "images", Tools.of(qemu_binary))
    like = {"cache": {"direct": True}, "aio": "native"}
    vm = QemuProcess.of(built, guest=True, qemu=qemu_binary, directory=vm_dir)
    vm.command = tuple(opened(word, str(built.disks[0].active.path), like) for word in vm.command)
    sent = []
    async with vm, qmpblock.connect(vm.monitor_path) as controller:
        real = controller.monitor._execute

        async def execute(name, arguments):
            sent.append((name, arguments))
            return await real(name, arguments)

        controller.monitor._execute = execute
        [disk] = await controller.disks()
        assert (await disk.allocate(AT, MIB, full=True)).reserved == MIB
    [file] = [
        arguments
        for name, arguments in sent
        if name == "blockdev-add" and arguments["driver"] == "file"
    ]
    assert file["aio"] == "native"
    assert file["cache"] == {"direct": True, "no-flush": False}


def opened(word, file, like):
    """Return a word of QEMU's command line in which a file is opened with other options."""
    if not word.startswith("{") or file not in word:
        return word
    described = json.loads(word)
    described["file"] |= like
    return json.dumps(described | {"cache": like["cache"]})


# -- others


async def test_a_foreign_snapshot_above_the_overlay(start_qemu, vm_dir, qemu_binary, invariant):
    """What the guest wrote is then in three images, and all of them are kept and named."""
    vm, built, _ = await one_disk(start_qemu, vm_dir, qemu_binary)
    tools, foreign = built.tools, str(vm_dir / "foreign.qcow2")
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", foreign, str(64 * MIB))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def snapshot():
            await vm.guest.fill(0, AT, MIB, 0x22)
            top = (await vm.execute("query-block"))[0]["inserted"]["node-name"]
            node = {"driver": "file", "filename": foreign}
            await vm.execute(
                "blockdev-add", driver="qcow2", node_name="foreign", file=node, backing=None
            )
            await vm.execute("blockdev-snapshot", node=top, overlay="foreign")

        with (
            at_command(controller.monitor, "blockdev-reopen", snapshot),
            pytest.raises(Error) as caught,
        ):
            await disk.allocate(AT, 8 * MIB, full=True)
        assert "qmpblock-" in str(caught.value.standing) + str(caught.value)
        await disk.refresh()
        foreign_, ours, *rest = [layer.node.name for layer in disk.chain.layers]
        assert (foreign_, rest) == ("foreign", ["d0", "d0-1"])
        nodes = (await controller.graph()).nodes
        assert {name for name in nodes if name.startswith("qmpblock-")} == {ours, f"{ours}-file"}
    invariant.forget(vm)  # it has another chain now
    number = await vm.guest.read(0, AT, MIB)
    await vm.guest.fill(0, AT + MIB, MIB, 0x22)
    assert number == await vm.guest.read(0, AT + MIB, MIB)


async def test_unplugged_in_the_middle(start_qemu, vm_dir, qemu_binary, invariant):
    """The disk goes away while its newest data is in the overlay: that comes home all the same."""
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    expected[AT : AT + MIB] = b"\x22" * MIB
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def pull():
            await vm.guest.fill(0, AT, MIB, 0x22)
            await faults.unplug(vm, "d0")

        with at_command(controller.monitor, "blockdev-reopen", pull), pytest.raises(Error):
            await disk.allocate(AT, 8 * MIB, full=True)
    invariant.forget(vm)  # its disk has gone
    await holds(vm, built, expected)


# -- what it tells


async def test_a_growing_dirty_bitmap_is_said(start_qemu, vm_dir, qemu_binary, invariant):
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    await vm.execute("block-dirty-bitmap-add", node="d0", name="backup")
    await invariant.begin(vm)
    at = ["--offset", str(AT), "--length", "2M"]
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", *at, "--full", "--json")
    assert code == 4, err
    document = valid(json.loads(out), "allocate")
    assert document["reserved"] == 2 * MIB
    assert document["held"] > 0
    [warning] = document["warnings"]
    assert "backup" in warning
    assert str(2 * MIB) in warning
    assert "backup" in err
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", *at, "--full", "--json")
    assert code == 0, err
    assert valid(json.loads(out), "allocate")["reserved"] == 0
    bitmaps = (await vm.execute("query-block"))[0]["inserted"]["dirty-bitmaps"]
    assert [(one["name"], one["count"]) for one in bitmaps] == [("backup", 2 * MIB)]
    await holds(vm, built, expected)


async def test_slices_and_speed(start_qemu, vm_dir, qemu_binary, invariant):
    """A slice is a second's worth; the speed can be changed while it runs."""
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    speed, told = Speed(4 * MIB), []

    def tell(progress):
        told.append((progress.done, asyncio.get_running_loop().time()))
        if progress.done > 8 * MIB:
            speed.rate = 0

    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with at_command(controller.monitor, 0, None) as trace:
            result = await disk.allocate(AT, 48 * MIB, full=True, speed=speed, progress=tell)
    assert result.reserved == 48 * MIB
    assert trace.count("transaction") > 3
    assert "stop" not in trace
    # Two and more slices at 4 MiB a second, of which a fifth of a second may come at once.
    third = min(when for done, when in told if done > 8 * MIB)  # is begun
    assert 8 * MIB / (third - told[0][1]) < 6 * MIB
    await holds(vm, built, expected)
