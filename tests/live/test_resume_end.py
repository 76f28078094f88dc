"""Copies of the end, and pivots, that go on from what another one left."""

import pytest
import resuming
from disturbed import nothing_of_ours
from fleecing import MIB
from pointing import at_ease, written
from resuming import LATER, SPEC, check, child, content, is_sound, unequal

import qmpblock
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

formats = pytest.mark.parametrize("fmt", ["qcow2", "raw"])


@pytest.fixture
async def built(vm_dir, qemu_binary):
    scenario = parse_scenario(resuming.DISK, "resumed")
    return await build(scenario, vm_dir / "images", Tools.of(qemu_binary))


async def started(start_qemu, built, spec=SPEC):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(spec)
    await written(vm, 50)
    return vm


@formats
@pytest.mark.parametrize("death", ["cancelled", "controller", "qemu", "start"])
@pytest.mark.parametrize("at", ["end", "pivot"])
async def test_it_goes_on_from_what_a_death_left(at, death, fmt, built, start_qemu, vm_dir):
    vm = await started(start_qemu, built)
    target = vm_dir / f"copy.{fmt}"
    partial = vm_dir / f"copy.{fmt}.partial"
    first = "start" if death == "start" else at
    if death in ("controller", "qemu"):
        async with child(vm, target, vm_dir, format=fmt, at=first) as controller:
            await controller.wait_for_output("copying")
            if death == "controller":
                controller.kill()
            else:
                await vm.kill()
                assert await controller.wait() != 0
                assert f"kept in {partial}" in controller.stderr
        if death == "controller":
            async with qmpblock.connect(vm.monitor_path) as controller:
                await controller.recover()
    else:
        assert await resuming.cancelled(vm, target, format=fmt, at=first) == (str(partial),)
    assert partial.exists()
    assert not target.exists()
    spec, rest = SPEC, None
    if death == "qemu":
        image = built.disks[0].active
        rest = await content(image.path, image.spec.format)
        spec = LATER
        vm = await started(start_qemu, built, LATER)
    await nothing_of_ours(vm)
    before = await content(partial, fmt)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(target, format=fmt, at=at, resume=True) as job:
            phases = set()
            async for seen in job:
                phases.add(seen.phase)
                if seen.phase == "comparing":
                    await job.set_speed(0)  # of jobs that are still to be made
                if seen.ready:
                    break
            async with vm.guest.bounds(0) as bounds:
                await job.complete()
        await disk.refresh()
        assert (disk.chain.active.file == str(target)) is (at == "pivot")
    assert "comparing" in phases
    assert not partial.exists()
    old = built.disks[0].active
    [one] = job.result.disks
    print(one, job.result.held)
    assert job.result.held < 2
    await at_ease(vm, spec)
    await vm.quit()
    closed = old.path if at == "pivot" else target
    after = await content(closed, old.spec.format if at == "pivot" else fmt)
    check(after, bounds[0], spec, rest)
    await is_sound(target, fmt)
    # At a pivot the guest has written on, there: what it lacked is looked for in what it left.
    assert 0 < one.missing <= unequal(before, after) <= one.copied < 56 * MIB
