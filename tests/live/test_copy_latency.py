"""Copies that hold the guest's latency: on a disk that is slow, which they share with the guest."""

import asyncio
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours
from jsonschema import Draft202012Validator

import qmpblock
from qmpblock.errors import DisconnectedError
from qmpblock.testing import Tools, build, parse_scenario, slow
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = Path(__file__).parents[2] / "docs/schema/copy.schema.json"
WANTED = 0.02
RATE = 10 * MIB  # bytes a second that the source can do
SLOW = "about: A disk.\nimages: [{size: 192M, content: [write 0 184M 0xaa]}]\n"
TWO = (
    "about: Two disks.\ndisks: [{name: a, images: [{size: 64M, content: [write 0 56M 0xaa]}]}, "
    "{name: b, images: [{size: 64M, content: [write 0 56M 0xbb]}]}]\n"
)
SPEC = StressSpec(
    offset=64 * MIB, blocks=32768, block_size=4096, queue_depth=4, seed=9, flush_every=50, rate=30
)

ways = pytest.mark.parametrize(
    ("at", "pivot"),
    [("start", False), ("end", False), ("end", True)],
    ids=["start", "end", "pivot"],
)


async def started(start_qemu, vm_dir, qemu_binary, rate=RATE):
    built = await build(parse_scenario(SLOW, "slow"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(replace(built, disks=(slow(built.disks[0], rate),)), guest=True)
    await vm.guest.stress(SPEC)
    return vm


async def goes_on(vm):
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    await nothing_of_ours(vm)


class EnoughError(Exception):
    pass


async def felt(vm, vm_dir, at, pivot, latency, seconds=5.0):
    """Copy for some seconds; return what the guest's requests took meanwhile, in seconds."""
    alone = await vm.guest.latency()
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        target = vm_dir / f"{at}-{latency}.qcow2"
        copying = disk.copy(target, at="start" if pivot else at, pivot=pivot, latency=latency)
        with pytest.raises(EnoughError):  # noqa: PT012
            async with copying as job:
                async for seen in job:
                    if seen.done > 0:
                        break
                await asyncio.sleep(2)  # so long it may take to see what the guest bears
                await vm.guest.latency()
                before = job.progress.done
                await asyncio.sleep(seconds)
                guest, seen = await vm.guest.latency(), job.progress
                raise EnoughError
    speed = (seen.done - before) / seconds
    print(f"{at}, {latency} s: {guest} after {alone}; {speed / MIB:.1f} MiB/s; {seen}")
    assert speed > 0.3 * MIB
    # The one that waits now is one more: alone it says little, and of a guest that hangs all.
    return (guest.mean_us * guest.requests + guest.waiting_us) / (guest.requests + 1) / 1e6


@ways
async def test_the_guest_is_as_quick_as_is_wanted(start_qemu, vm_dir, qemu_binary, at, pivot):
    """And is not, where nobody wants it."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    await asyncio.sleep(1)
    without = await felt(vm, vm_dir, at, pivot, 0)
    held = await felt(vm, vm_dir, at, pivot, WANTED)
    await goes_on(vm)
    assert without > 2 * WANTED
    assert held < 4 * WANTED
    assert held < 0.6 * without


async def test_the_worst_of_several_disks_counts(start_qemu, vm_dir, qemu_binary):
    """The other could be copied in no time, and its guest does nothing."""
    built = await build(parse_scenario(TWO, "two"), vm_dir / "images", Tools.of(qemu_binary))
    disks = (built.disks[0], slow(built.disks[1], RATE))
    vm = await start_qemu(replace(built, disks=disks), guest=True)
    await vm.guest.stress(replace(SPEC, disk=1, offset=56 * MIB, blocks=1024, rate=60))
    speeds = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        targets = {one: vm_dir / f"{one.name}.qcow2" for one in await controller.disks()}
        async with controller.copy(targets, at="end", latency=WANTED) as job:
            async for seen in job:
                speeds += [one["speed"] for one in await vm.execute("query-block-jobs")]
                if seen.ready:
                    break
    print(job.result.latency, min(speeds), statistics.median(speeds), max(speeds))
    assert statistics.median(speeds) < 1.5 * RATE
    assert job.result.latency.mean < 4 * WANTED
    await vm.guest.stop_stress(1)
    await nothing_of_ours(vm)


@pytest.mark.parametrize("words", [["--at", "end"], ["--at", "start", "--speed", "50M"]])
async def test_the_command_tells_of_it(start_qemu, vm_dir, qemu_binary, words):
    vm = await started(start_qemu, vm_dir, qemu_binary, rate=60 * MIB)
    target = str(vm_dir / "copy.qcow2")
    options = [*words, "--latency", "20ms"]
    code, out, err = await cli("copy", vm.monitor_path, "vd0", target, *options, "--json")
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    felt = told["latency"]
    assert felt["wanted"] == WANTED
    assert 0 < felt["mean"] <= felt["longest"]
    assert "kept to " in err
    code, out, err = await cli("copy", vm.monitor_path, "vd0", target, *options, "--force")
    assert code == 0, err
    assert "(wanted: 20 ms); it was above that " in out
    await goes_on(vm)


EDGES = [round(1e6 * edge) for edge in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)]  # ns


async def bins(vm):
    [entry] = [one for one in await vm.execute("query-blockstats") if one.get("qdev")]
    return [entry["stats"][f"{kind}_latency_histogram"] for kind in ("rd", "wr")]


async def tail_of(vm, vm_dir, latency, seconds=12.0):
    """Copy for some seconds; return the share of the guest's writes that took 200 ms and more."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        copying = disk.copy(vm_dir / f"{latency}.qcow2", at="end", latency=latency)
        with pytest.raises(EnoughError):  # noqa: PT012
            async with copying as job:
                async for seen in job:
                    if seen.done > 0:
                        break
                await asyncio.sleep(3)
                _, before = await bins(vm)
                await asyncio.sleep(seconds)
                _, after = await bins(vm)
                told = job.progress
                raise EnoughError
    new = [b - a for a, b in zip(before["bins"], after["bins"], strict=True)]
    above = sum(new[EDGES.index(2 * 10**8) + 1 :]) / sum(new)
    print(f"{latency} s: {new}, {above:.1%} above 200 ms; {told}")
    assert told.measure == ("p99" if latency else "mean")
    return above


async def test_where_there_are_histograms_99_of_100_requests_count(start_qemu, vm_dir, qemu_binary):
    """They are somebody's, and stay as they are; their bins go on to be filled."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    [path] = [one["qdev"] for one in await vm.execute("query-block") if one.get("qdev")]
    await vm.execute("block-latency-histogram-set", id=path, boundaries=EDGES)
    without = await tail_of(vm, vm_dir, 0)
    held = await tail_of(vm, vm_dir, 0.2)
    assert all(one["boundaries"] == EDGES for one in await bins(vm))
    await goes_on(vm)
    assert held < 0.6 * without
    assert without > 0.05


async def test_what_setting_a_histogram_does_to_an_iothread(
    start_qemu, vm_dir, qemu_binary, invariant, qemu_version
):
    """So none is set (K30): 7.2 frees one that the iothread counts in, and may die of it."""
    text = SLOW + "attach: {iothread: one}\n"
    built = await build(parse_scenario(text, "busy"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    may_die = qemu_version < (10, 0, 0)
    if may_die:
        vm.expect_exit()
    invariant.forget(vm)
    spec = StressSpec(
        offset=0, blocks=8192, block_size=512, queue_depth=16, seed=9, flush_every=0, rate=0
    )
    await vm.guest.stress(spec)
    [path] = [one["qdev"] for one in await vm.execute("query-block") if one.get("qdev")]
    died, tries = False, 0
    try:
        for tries in range(300):
            edges = [10 * step for step in range(1, 200 + tries % 50)]
            await vm.execute("block-latency-histogram-set", id=path, boundaries=edges)
    except DisconnectedError:
        died = True
        await vm.wait(30)  # its last word is not its end
    print(f"died: {died}, after {tries + 1} tries")
    assert may_die or not died
    if may_die and not died:
        await vm.kill()  # what it has of memory may be such that it dies of quitting
