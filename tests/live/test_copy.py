"""Copies of running disks: of their very end, and with the guest going over to them."""

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from allocating import at_command
from chaincases import FIXTURES, is_encrypted
from chains import convert, digest_without, nothing_left, subjects
from chainwriters import DeviceWriter, StampWriter
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.changes import change
from qmpblock.copying import mirrors, storing
from qmpblock.copying.copy import copy
from qmpblock.copying.fleecing import Fleece, fleecing
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    InUseError,
    JobError,
    RequestError,
    UnsupportedError,
)
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

EVERY = sorted(path.name for path in FIXTURES.glob("*.yaml"))


async def numbers_of(vm, every):
    """Return the guest's numbers of the disks that it stamps, by the subjects' names."""
    return {
        name: one.writer.spec.disk
        for name, one in every.items()
        if isinstance(one.writer, StampWriter)
    }


async def check_content(one, image, directory, bounds=None):
    """Check that a closed copy holds the disk; of the writer's area, one point within bounds."""
    content = directory / "content.raw"
    await convert(one.tools, image, image.describe(), content)
    assert digest_without(content, one.area) == one.digest
    with content.open("rb") as file:
        file.seek(one.area.offset)
        data = file.read(one.area.length)
    content.unlink()
    if bounds is not None:
        verdict = check_point_in_time(data, one.writer.spec, bounds, background=one.area.byte)
        assert verdict.ok, verdict
    await image.check(one.tools)


@pytest.mark.parametrize("at", ["start", "end", "pivot"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.scenarios(*EVERY)
async def test_every_disk(scenario, at, fmt, start_qemu, invariant, vm_dir, qemu_binary):
    """All disks of a VM at one instant, while its guest writes to them."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    every = await subjects(built, vm_dir)
    vm = await start_qemu(built, guest=True)
    for one in every.values():
        await one.attach(vm)
    await invariant.begin(vm)
    (vm_dir / "copies").mkdir()
    before = {name: one.every_file() for name, one in every.items()}
    numbers = await numbers_of(vm, every)
    secret = any(is_encrypted(layer.spec) for one in every.values() for layer in one.layers)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = {name: await controller.disk(one.path) for name, one in every.items()}
        targets = {disk: vm_dir / "copies" / f"{name}.{fmt}" for name, disk in disks.items()}
        hanging = at == "pivot" and any(hangs(vm, one) for one in every.values())
        huge = at == "start" and fmt == "raw" and vm.version < (10, 0, 0)
        huge = huge and any(disk.size > 1 << 39 for disk in targets)
        if (secret and fmt == "raw") or hanging or huge:
            with pytest.raises(
                UnsupportedError, match=r"plaintext|hangs for good|be reserved for all"
            ):
                async with copy(controller, targets, at=at, format=fmt):
                    pass
            for one in every.values():
                await one.writer.stop()
            return
        for one in every.values():
            await one.keeps_writing()
        async with AsyncExitStack() as stack:
            copying = copy(controller, targets, at=at, format=fmt)
            if at == "start" and numbers:
                async with vm.guest.bounds(*numbers.values()) as bounds:
                    job = await stack.enter_async_context(copying)
            else:
                job = await stack.enter_async_context(copying)
            async for seen in job:
                if seen.ready:
                    break
            for one in every.values():
                await one.keeps_writing()
            assert job.result is None
            if vm.version < (10, 0, 0):  # I/O by a monitor is not held by a pause (K26)
                for one in every.values():
                    onto = {"pivot": fmt, "start": one.layers[0].spec.format}.get(at)
                    if onto in ("raw", "luks") and isinstance(one.writer, DeviceWriter):
                        await one.writer.stop()
            if at != "start" and numbers:
                async with vm.guest.bounds(*numbers.values()) as bounds:
                    await job.complete()
            else:
                await job.complete()
        assert [one.target for one in job.result.disks] == [str(path) for path in targets.values()]
        for name, disk in disks.items():
            if not every[name].writer.stopped:
                await every[name].keeps_writing()
            await disk.refresh()
            active = Path(disk.chain.active.file)
            assert (active == targets[disk]) is (at == "pivot")
    for one in every.values():
        if not one.writer.stopped:
            await one.writer.stop()
    assert sorted(path.name for path in (vm_dir / "copies").iterdir()) == sorted(
        f"{name}.{fmt}" for name in every
    )
    copies = {name: every[name].copy_at(targets[disk], fmt) for name, disk in disks.items()}
    if at == "pivot":
        for name, one in every.items():
            one.move_to(copies[name])
            invariant.expect(one.documented(before=before[name], made=str(copies[name].path)))
    await nothing_left(vm, every.values())
    await invariant.verify(vm)
    if at != "pivot":
        for name, one in every.items():
            point = bounds[numbers[name]] if name in numbers else None
            await check_content(one, copies[name], vm_dir, point)
    await vm.quit()
    for one in every.values():
        await one.verify()


@pytest.mark.parametrize(("at", "looks"), [("start", 8), ("end", 5), ("pivot", 6)])
@pytest.mark.scenarios("chain-2.yaml")
async def test_the_graph_is_read_where_it_may_be_another_one(
    scenario, at, looks, start_qemu, invariant, vm_dir
):
    """Each look takes milliseconds, whatever the disk's size; half of those were of no use."""
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with at_command(controller.monitor, "none", lambda: None) as sent:
            async with copy(controller, {disk: vm_dir / "copy"}, at=at):
                pass
    assert sent.count("query-named-block-nodes") <= looks
    assert len(sent) <= 120
    if at == "pivot":
        invariant.forget(vm)  # its chain is another one now


def hangs(vm, one):
    """Whether this QEMU would hang, were another image to take the place of this one (K27)."""
    attach = one.disk.spec.attach
    return bool(attach.filters) and attach.iothread != "none" and vm.version < (10, 0, 0)


FILTERED = """
about: A filter above an image, in an iothread.
images: [{size: 8M, content: [write 0 1M 0xaa]}]
attach: {filters: [throttle], iothread: one}
"""


async def test_a_move_below_a_filter_in_an_iothread(start_qemu, vm_dir, qemu_version):
    vm = await start_qemu(parse_scenario(FILTERED, "filtered"), guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        if qemu_version < (10, 0, 0):
            with pytest.raises(UnsupportedError, match="hangs for good") as caught:
                async with copy(controller, {disk: vm_dir / "copy"}, at="pivot"):
                    pass
            assert "nothing was touched" in str(caught.value)
        async with copy(controller, {disk: vm_dir / "copy"}, at="end") as job:
            pass
        assert job.result.disks[0].size == disk.size


BELOW = """
about: Data in a backing image that the overlay does not hide.
images: [{size: 8M, content: [write 1M 1M 0xaa]}, {content: [write 3M 1M 0xbb]}]
"""


async def test_a_mirror_of_a_view_leaves_out_what_lies_below(start_qemu, vm_dir, qemu_binary):
    """So it is no way to copy one (K28)."""
    vm = await start_qemu(parse_scenario(BELOW, "below"))
    target = vm_dir / "copy.qcow2"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with fleecing(controller, [disk], Fleece()) as [shown]:
            plain = {"driver": "snapshot-access", "node-name": "view"}  # ours may be more (K37)
            filter_ = shown.node.replace("-view", "-filter")
            await vm.execute("blockdev-add", **plain, file=filter_)
            await create(qemu_binary, target, disk.size)
            file = {"driver": "file", "filename": str(target)}
            await vm.execute("blockdev-add", **{"driver": "qcow2", "node-name": "t", "file": file})
            mirror = {"job-id": "m", "device": "view", "target": "t", "sync": "full"}
            await vm.execute("blockdev-mirror", **mirror)
            while [one["status"] for one in await vm.execute("query-jobs")] != ["ready"]:
                await asyncio.sleep(0.01)
            await vm.execute("block-job-cancel", device="m")
            while await vm.execute("query-jobs"):
                await asyncio.sleep(0.01)
            for node in ("t", "view"):
                await vm.execute("blockdev-del", **{"node-name": node})
    tools = Tools.of(qemu_binary)
    raw = vm_dir / "copy.raw"
    await tools.run(tools.img, "convert", "-f", "qcow2", "-O", "raw", str(target), str(raw))
    data = raw.read_bytes()
    assert data[3 << 20 : 4 << 20] == b"\xbb" * (1 << 20)
    assert data[1 << 20 : 2 << 20] == bytes(1 << 20)  # 0xaa in the disk


async def create(qemu_binary, path, size):
    tools = Tools.of(qemu_binary)
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(path), str(size))


SPARSE = """
about: A chain that holds little of a large disk.
images: [{size: 256M, content: [write 1M 1M 0xaa]}, {content: [write 3M 1M 0xbb]}]
"""


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("at", ["start", "end"])
async def test_what_nobody_wrote_to_takes_no_space(at, fmt, start_qemu, vm_dir):
    vm = await start_qemu(parse_scenario(SPARSE, "sparse"))
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(target, at=at, format=fmt) as job:
            pass
        assert job.result.disks[0].size == 256 << 20
    assert 2 << 20 <= target.stat().st_blocks * 512 <= 3 << 20


@pytest.mark.parametrize("at", ["start", "end", "pivot"])
@pytest.mark.scenarios("chain-3.yaml", "qcow2-zero-clusters.yaml", "short-base.yaml")
async def test_the_top_alone(scenario, at, start_qemu, invariant, vm_dir, qemu_binary):
    """The copy lies on the same backing image; zeros that hide what lies there still do (K2)."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    one = (await subjects(built, vm_dir))["d0"]
    vm = await start_qemu(built, guest=True)
    await one.attach(vm)
    await invariant.begin(vm)
    invariant.forget(vm)  # test_every_disk looks at the VM
    target = vm_dir / "top.qcow2"
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(one.path)
        chain = disk.chain.layers
        options = {"pivot": True} if at == "pivot" else {"at": at}
        await one.keeps_writing()
        async with (
            vm.guest.bounds(one.writer.spec.disk) as bounds,
            disk.copy(target, layers="top", format="qcow2", **options),
        ):
            pass
        await one.keeps_writing()
        await disk.refresh()
        if at == "pivot":
            assert disk.chain.active.file == str(target)
            assert [layer.file for layer in disk.chain.layers[1:]] == [
                layer.file for layer in chain[1:]
            ]
    await one.writer.stop()
    copied = one.copy_at(target, "qcow2")
    spec = replace(copied.spec, backing_name="absolute", backing_format=True)
    copied = replace(copied, spec=spec, backing=one.layers[0].backing)
    await vm.quit()
    if at == "pivot":
        one.move_to(copied, *one.layers[1:])
        await one.verify()
    else:
        await check_content(one, copied, vm_dir, bounds[one.writer.spec.disk])


TWO = """
about: Two disks, of one instant.
disks: [{images: [{size: 8M, content: [write 0 1M 0xaa]}]}, {images: [{format: raw, size: 8M}]}]
"""


async def two_disks(start_qemu):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    for number in (0, 1):
        spec = StressSpec(disk=number, offset=4 << 20, blocks=512, block_size=4096, flush_every=64)
        await vm.guest.stress(spec)
    return vm


async def goes_on(vm):
    """See that the guest's writes on both disks are acknowledged, and were read back right."""
    for number in (0, 1):
        before = (await vm.guest.progress(number)).acked
        async with asyncio.timeout(60):
            while (await vm.guest.progress(number)).acked < before + 10:
                await asyncio.sleep(0.01)
        done = await vm.guest.stop_stress(number)
        assert (done.bad, done.errors) == (0, 0), done
        assert await vm.guest.check(number) > 0


@pytest.mark.parametrize("at", ["end", "pivot"])
async def test_disks_that_cannot_be_brought_to_one_instant(at, start_qemu, vm_dir, monkeypatch):
    """All are given back, and it is tried again; then the copy fails."""
    monkeypatch.setattr(mirrors, "HOLD", 0.2)
    real, longest = mirrors.Mirrors._states, []

    async def states(self, jobs):
        seen = await real(self, jobs)
        return [*seen[:-1], seen[-1].replace("pending", "ready")]

    monkeypatch.setattr(mirrors.Mirrors, "_states", states)
    vm = await two_disks(start_qemu)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        targets = {disk: vm_dir / disk.name for disk in disks}
        with pytest.raises(qmpblock.Error, match="in 3 attempts") as caught:
            async with copy(controller, targets, at=at):
                pass
        assert "the guest is where it was" in str(caught.value)
        longest += [(await vm.guest.latency(number)).longest_us for number in (0, 1)]
    print(f"longest requests of the guest: {longest} us")
    made = [path.name for path in vm_dir.iterdir() if path.name.startswith("vd")]
    assert sorted(made) == ["vd0.partial", "vd1.partial"]
    await goes_on(vm)


@pytest.mark.parametrize("how", ["job-complete", "block-job-cancel"])
async def test_a_job_that_somebody_else_asks_to_end(how, start_qemu, vm_dir):
    """The guest is not held by it, nor taken to the copy; the copy fails."""
    vm = await two_disks(start_qemu)

    async def copy_while_somebody_meddles(controller, disk):
        async with copy(controller, {disk: vm_dir / "copy"}, at="end") as job:
            async for seen in job:
                if seen.ready:
                    break
            [its] = await vm.execute("query-jobs")
            await vm.execute(how, **{"id" if how == "job-complete" else "device": its["id"]})
            async for _ in job:
                pass

    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, _] = await controller.disks()
        with pytest.raises(JobError):
            await copy_while_somebody_meddles(controller, disk)
        await disk.refresh()
        assert Path(disk.chain.active.file).name != "copy"
    assert not (vm_dir / "copy").exists()
    await goes_on(vm)


@pytest.mark.parametrize("at", ["start", "end"])
async def test_what_somebody_has_open_is_never_replaced(at, start_qemu, vm_dir):
    """An image of this VM, of another, by whatever name; and what a copy is being made as."""
    vm, other = await two_disks(start_qemu), await two_disks(start_qemu)
    link = vm_dir / "link"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, second] = await controller.disks()
        link.hardlink_to(second.chain.active.file)
        async with qmpblock.connect(other.monitor_path) as elsewhere:
            theirs = (await elsewhere.disks())[0].chain.active.file
        ours = [layer.file for one in (disk, second) for layer in one.chain.layers]
        for file in (*ours, theirs, link):
            before = Path(file).stat().st_ino
            with pytest.raises(
                InUseError, match=r"is open in (this very )?process .*not replaced"
            ) as caught:
                async with copy(controller, {disk: file}, at=at, force=True):
                    pass
            assert caught.value.standing == UNTOUCHED
            assert Path(file).stat().st_ino == before
        target = vm_dir / "copy"
        async with copy(controller, {disk: target}, at=at):
            with pytest.raises(InUseError, match=r"copy\.partial is open in"):
                async with copy(controller, {second: target}, at=at, force=True):
                    pass
        target.unlink()
        with (
            pytest.raises(InUseError, match=r"is open in (this very )?process"),
            target.open("w+b") as held,
        ):
            async with copy(controller, {disk: target}, at=at, force=True):
                held.write(b"theirs")
        target.unlink()
        with pytest.raises(InUseError, match=r"is open in (this very )?process"):
            async with copy(controller, {disk: link.with_name("new")}, at=at, force=True):
                os.link(theirs, vm_dir / "new")
        (vm_dir / "new").unlink()
    assert not list(vm_dir.glob("copy*"))
    await goes_on(vm)
    await goes_on(other)


async def test_one_target_by_two_names(start_qemu, vm_dir):
    vm = await two_disks(start_qemu)
    (vm_dir / "link").symlink_to(vm_dir)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [one, other] = await controller.disks()
        for names in (("copy", "link/copy"), ("copy", "copy")):
            targets = dict(zip((one, other), (vm_dir / name for name in names), strict=True))
            with pytest.raises(RequestError, match="copy is named for two disks"):
                async with copy(controller, targets, force=True):
                    pass
    await goes_on(vm)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("at", ["start", "end"])
async def test_a_file_that_comes_to_bear_the_name_meanwhile(at, force, start_qemu, vm_dir):
    """It is replaced only where that was asked for."""
    vm = await two_disks(start_qemu)
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, _] = await controller.disks()
        if force:
            async with copy(controller, {disk: target}, at=at, force=True):
                target.write_text("theirs")
            assert target.stat().st_size > 6
        else:
            with pytest.raises(qmpblock.Error, match="File exists"):
                async with copy(controller, {disk: target}, at=at):
                    target.write_text("theirs")
            assert target.read_text() == "theirs"
    kept = [] if force else ["copy.partial"]
    assert sorted(path.name for path in vm_dir.glob("copy*")) == ["copy", *kept]
    await goes_on(vm)


VIEWS = pytest.mark.needs_qemu(">= 10.0", reason="before, the guest comes home before it is whole")


@pytest.mark.parametrize("at", [pytest.param("start", marks=VIEWS), "end"])
async def test_one_that_is_whole_is_said_to_be_where_clearing_up_fails(
    at, start_qemu, vm_dir, monkeypatch
):
    """It is there, under its name: whoever is told that there is none makes it again."""
    vm = await start_qemu(
        parse_scenario("about: A disk.\nimages: [{size: 8M, content: [write 0 1M 0xaa]}]\n", "one")
    )
    allow, refusals = change.allow_migration, [CommandError("blockdev-del", {}, "E", "not now")]

    async def refused(*arguments):
        if refusals:
            raise refusals.pop()
        await allow(*arguments)

    monkeypatch.setattr(change, "allow_migration", refused)
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(CommandError, match="not now") as caught:
            async with disk.copy(target, at=at):
                pass
    assert target.exists()
    assert "whole, and on stable storage" in caught.value.standing
    assert "no copy" not in caught.value.standing
    await nothing_of_ours(vm)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.scenarios("chain-2.yaml")
async def test_what_is_copied_goes_to_storage_meanwhile(
    scenario, at, start_qemu, vm_dir, qemu_binary, monkeypatch
):
    """And not all of it at the end."""
    files = []
    begin = storing.begin_writeback

    def noted(fd):
        files.append(os.readlink(f"/proc/self/fd/{fd}"))
        begin(fd)

    monkeypatch.setattr(storing, "begin_writeback", noted)
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, *_] = await controller.disks()
        async with disk.copy(target, at=at, speed=1 << 20) as job:
            while not files:
                await asyncio.sleep(0.01)
            await job.set_speed(0)
    assert set(files) == {f"{target}.partial"}
