"""Copies that go on from what another one left: after every kind of death, and nothing but that."""

import asyncio
from dataclasses import replace

import fleecing
import pytest
import resuming
from disturbed import nothing_of_ours
from fleecing import MIB, begin_writing, ran
from pointing import DISKS, SHOWN, STEPS, TWO, at_ease, written
from resuming import LATER, SPEC, cancelled, check, check_figures, child, content, is_sound, resumed

import qmpblock
from qmpblock.copying import resuming as library
from qmpblock.copying.copy import copy
from qmpblock.errors import BusyError, Error, InUseError, RequestError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import check_point_in_time

pytestmark = pytest.mark.live

ALL = replace(fleecing.SPEC, rate=300)
formats = pytest.mark.parametrize("fmt", ["qcow2", "raw"])


async def started(start_qemu, built, spec=SPEC):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(spec)
    await written(vm, 50)
    return vm


@pytest.fixture
async def built(vm_dir, qemu_binary):
    scenario = parse_scenario(resuming.DISK, "resumed")
    return await build(scenario, vm_dir / "images", Tools.of(qemu_binary))


@formats
@pytest.mark.parametrize("death", ["cancelled", "controller"])
async def test_what_a_death_left(death, fmt, built, start_qemu, vm_dir):
    vm = await started(start_qemu, built)
    target = vm_dir / f"copy.{fmt}"
    partial = vm_dir / f"copy.{fmt}.partial"
    if death == "cancelled":
        kept = await cancelled(vm, target, format=fmt)
        assert kept == (str(partial),)
    else:
        async with child(vm, target, vm_dir, format=fmt) as controller:
            await controller.wait_for_output("copying")
            controller.kill()
        async with qmpblock.connect(vm.monitor_path) as controller:
            await controller.recover()
    await nothing_of_ours(vm)
    before = await content(partial, fmt)
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        resumed(vm, controller, target, format=fmt) as (job, bounds),
    ):
        phases = [seen.phase async for seen in job]
    assert "comparing" in phases
    assert not partial.exists()
    await is_sound(target, fmt)
    after = await content(target, fmt)
    check(after, bounds)
    check_figures(job, before, after)
    assert 0 < job.result.disks[0].missing < 40 * MIB
    await at_ease(vm, SPEC)


@formats
@pytest.mark.parametrize("death", ["qemu", "both"])
async def test_what_the_death_of_qemu_left(death, fmt, built, start_qemu, vm_dir):
    vm = await started(start_qemu, built)
    target = vm_dir / f"copy.{fmt}"
    partial = vm_dir / f"copy.{fmt}.partial"
    async with child(vm, target, vm_dir, format=fmt) as controller:
        await controller.wait_for_output("copying")
        if death == "both":
            controller.kill()
        await vm.kill()
        if death == "qemu":
            assert await controller.wait() != 0
            assert f"kept in {partial}" in controller.stderr
    image = built.disks[0].active
    await qmpblock.recover_images([image.path])
    rest = await content(image.path, image.spec.format)
    before = await content(partial, fmt)
    vm = await started(start_qemu, built, LATER)
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        resumed(vm, controller, target, format=fmt) as (job, bounds),
    ):
        pass
    await is_sound(target, fmt)
    after = await content(target, fmt)
    check(after, bounds, LATER, rest)
    check_figures(job, before, after)
    assert 0 < job.result.disks[0].missing < 44 * MIB
    await at_ease(vm, LATER)


@pytest.mark.parametrize("kind", ["raw", "chain", "throttle", "virtio-scsi", "iothread", "luks"])
async def test_every_kind_of_disk_and_its_proof(kind, start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS[kind], "disk"), guest=True)
    await begin_writing(vm, ALL)
    target = vm_dir / "copy.qcow2"
    await cancelled(vm, target, format="qcow2")
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        resumed(vm, controller, target, format="qcow2", verify=True) as (job, bounds),
    ):
        pass
    [one] = job.result.disks
    assert job.result.verified
    assert one.copied == one.missing <= one.compared == one.size
    if kind != "luks":  # of which what is blank is no zeros
        assert one.missing < one.size
        data = await content(target, "qcow2")
        found = check_point_in_time(data[: 16 * MIB], ALL, bounds)
        assert found.ok, found
        assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    await at_ease(vm, ALL)


async def test_the_top_alone(built, start_qemu, vm_dir):
    """It lies on the same backing image, and hides what it is to hide of that."""
    vm = await started(start_qemu, built)
    target = vm_dir / "top.qcow2"
    await cancelled(vm, target, layers="top", format="qcow2")
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(RequestError, match="the backing image that it names") as caught:
            async with disk.copy(target, format="qcow2", resume=True):
                pass
        assert "--layers" in caught.value.remedy
        async with resumed(vm, controller, target, layers="top", format="qcow2") as (job, bounds):
            pass
    assert job.result.disks[0].missing < 20 * MIB
    check(await content(target, "qcow2"), bounds)
    await at_ease(vm, SPEC)


@pytest.mark.parametrize("shape", [{"compress": True}, {"cluster_size": 2 * MIB}], ids=str)
async def test_an_image_of_another_shape(shape, built, start_qemu, vm_dir):
    """Also over clusters that are compressed, and in whole clusters, of whatever size."""
    vm = await started(start_qemu, built)
    target, partial = vm_dir / "copy.qcow2", vm_dir / "copy.qcow2.partial"
    await cancelled(vm, target, format="qcow2", **shape)
    wrong = ["write -P 0x55 1M 192K"]
    if "compress" in shape:  # where there is nothing of it yet: data, and zeros
        wrong += ["write -c -P 0x55 24M 64K", "write -c -P 0x55 44M 64K"]
    words = [word for one in wrong for word in ("-c", one)]
    code, out = await ran("qemu-io", "-f", "qcow2", *words, partial)
    assert code == 0, out
    before = await content(partial, "qcow2")
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        resumed(vm, controller, target, format="qcow2") as (job, bounds),
    ):
        pass
    await is_sound(target, "qcow2")
    after = await content(target, "qcow2")
    check(after, bounds)
    [one] = job.result.disks
    assert one.missing == resuming.unequal(before, after)
    assert one.missing <= one.copied < 44 * MIB
    await at_ease(vm, SPEC)


async def test_of_two_disks_one_is_gone_on_from(start_qemu, vm_dir):
    """The other begins anew; both are of one instant."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await begin_writing(vm, *STEPS)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        targets = {disk: vm_dir / f"{disk.name}.qcow2" for disk in disks}

        async def broken():
            async with copy(controller, targets, format="qcow2", speed=4 * MIB) as job:
                async for seen in job:
                    if seen.done >= 6 * MIB:
                        raise KeyError

        with pytest.raises(KeyError):
            await broken()
        names = sorted(path.name for path in vm_dir.glob("vd*"))
        assert names == ["vd0.qcow2.partial", "vd1.qcow2.partial"]
        (vm_dir / "vd0.qcow2.partial").unlink()
        async with vm.guest.bounds(0, 1) as bounds:
            copying = copy(controller, targets, format="qcow2", resume=True)
            await copying.__aenter__()
        await copying.__aexit__(None, None, None)
    for spec, disk in zip(STEPS, disks, strict=True):
        data = await content(targets[disk], "qcow2")
        found = check_point_in_time(data[: spec.length], spec, bounds[spec.disk])
        assert found.ok, found
    await at_ease(vm, *STEPS)


async def test_broken_off_while_it_is_compared(built, start_qemu, vm_dir, monkeypatch):
    """What was there stays, as it was; nothing else does."""
    vm = await started(start_qemu, built)
    target, partial = vm_dir / "copy.qcow2", vm_dir / "copy.qcow2.partial"
    await cancelled(vm, target, format="qcow2")
    before = await content(partial, "qcow2")
    comparing = asyncio.Event()

    async def compare(*_, **__):
        comparing.set()
        await asyncio.sleep(600)

    monkeypatch.setattr(library, "find_unequal", compare)

    async def run():
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            async with disk.copy(target, format="qcow2", resume=True):
                pass

    running = asyncio.ensure_future(run())
    await asyncio.wait_for(comparing.wait(), 60)
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        with pytest.raises(Error):  # also another one's resume
            async with (await controller.disks())[0].copy(target, format="qcow2", resume=True):
                pass
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await content(partial, "qcow2") == before
    await at_ease(vm, SPEC)


async def test_what_it_does_not_go_on_from_is_left_alone(built, start_qemu, vm_dir, invariant):
    vm = await started(start_qemu, built)
    await invariant.begin(vm)
    target, partial = vm_dir / "copy.qcow2", vm_dir / "copy.qcow2.partial"
    partial.write_bytes(bytes(resuming.SIZE))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def refused(kind, words, **options):
            with pytest.raises(kind, match=words) as caught:
                async with disk.copy(target, resume=True, **options):
                    pytest.fail("it copies")
            assert caught.value.standing == "nothing was touched"
            assert partial.read_bytes() == bytes(resuming.SIZE)

        await refused(RequestError, "no qcow2 image", format="qcow2")
        with partial.open("r+b"):
            await refused(InUseError, "has it open for writing", format="raw")
        target.write_text("theirs")
        await refused(RequestError, "exists already", format="raw")
    await at_ease(vm, SPEC)
    await invariant.verify(vm)


async def test_who_has_the_server_already_is_said_first(built, start_qemu, vm_dir):
    vm = await started(start_qemu, built)
    target, partial = vm_dir / "copy.raw", vm_dir / "copy.raw.partial"
    partial.write_bytes(bytes(resuming.SIZE))
    theirs = {"type": "unix", "data": {"path": str(vm_dir / "theirs")}}
    await vm.execute("nbd-server-start", addr=theirs)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(BusyError, match="not ours already runs"):
            async with disk.copy(target, format="raw", resume=True):
                pytest.fail("it copies")
        await vm.execute("nbd-server-stop")
        planned = await disk.plan_copy(target, format="raw", resume=True)
    assert planned.disks[0].target == str(target)
    assert partial.read_bytes() == bytes(resuming.SIZE)
    await at_ease(vm, SPEC)


async def test_a_bitmap_is_gone_with_a_qemu_that_is_killed(built, start_qemu):
    """No persistent one tells afterwards what a target holds, nor that it does not know (F25)."""
    image = built.disks[0].active.path
    for kills in (False, True):
        vm = await started(start_qemu, built)
        named = f"kills-{kills}"
        await vm.execute("block-dirty-bitmap-add", node="d0", name=named, persistent=True)
        await written(vm, 50)
        await (vm.kill() if kills else vm.quit())
    code, out = await ran("qemu-img", "info", "-f", "qcow2", image)
    assert code == 0, out
    assert "kills-False" in out
    assert "kills-True" not in out
