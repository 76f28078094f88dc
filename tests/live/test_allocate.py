"""Thin allocation of running disks, of every shape of chain, while the guest writes."""

import asyncio
import dataclasses

import pytest
from allocating import (
    allocations_under_stress,
    area_of,
    at_command,
    blank,
    check_thin,
    content,
    disks,
    ended,
    has_subclusters,
    started,
)
from chains import cli
from disturbed import nothing_of_ours
from rounds import rounds

import qmpblock
from qmpblock.errors import GraphError, RangeError, RequestError, UnsupportedError
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed
from qmpblock.testing import faults
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live


@pytest.mark.parametrize(("scenario", "name"), disks(lambda _, chain: len(chain) > 1))
async def test_every_chain(scenario, name, start_qemu, invariant, vm_dir, qemu_binary):
    vm, every = await started(scenario, name, start_qemu, vm_dir, qemu_binary)
    subject = every[name]
    image = subject.disk.spec.active
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(subject.path)
        before = await disk.map()
        if has_subclusters(image) and vm.version < (10, 0, 0):
            with pytest.raises(UnsupportedError, match="subclusters"):
                await disk.allocate()
        else:
            result = await disk.allocate()
            after = await disk.map()
            cluster = disk.chain.active.node.cluster_size or 512
            check_thin(before, after, cluster, disk.size, area_of(subject, cluster))
            assert (result.rounded_offset, result.rounded_length) == (0, disk.size)
            again = await disk.allocate()
            assert (again.allocated, again.reserved) == (0, 0)
        await subject.keeps_writing()
    assert subject.changed_files() == set(), "a frozen layer has changed"
    await invariant.verify(vm)
    await ended(vm, every)


MIB = 1 << 20
FULL_BASE = """
about: A base that is data throughout, under a blank overlay.
images:
  - {size: 32M, content: [write 0 32M 0xaa]}
  - {size: 32M}
"""


@pytest.mark.scenarios("chain-3.yaml", "qed-chain.yaml", "qcow2-cluster-2m.yaml")
async def test_a_range_is_rounded_to_clusters(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        cluster = disk.chain.active.node.cluster_size
        for offset, length in ((1, 1), (MIB + 7, 3 * cluster), (disk.size - 1, 1), (disk.size, 0)):
            before = await disk.map()
            result = await disk.allocate(offset, length)
            start, stop = result.rounded_offset, result.rounded_offset + result.rounded_length
            assert (result.offset, result.length) == (offset, length)
            assert start <= offset
            assert offset + length <= stop
            assert start % cluster == 0 or not length
            assert stop % cluster == 0 or stop == disk.size
            assert stop - start < length + 2 * cluster
            after = await disk.map()
            check_thin(before, after, cluster, disk.size, Ranges(), start, stop - start)
        for offset, length in ((-1, 1), (0, disk.size + 1), (disk.size + 1, 0), (5, -1)):
            with pytest.raises(RangeError):
                await disk.allocate(offset, length)
        with pytest.raises(RequestError, match="whole"):
            await disk.allocate(0, cluster, independent=True)


@pytest.mark.scenarios("qcow2-empty.yaml")
async def test_one_layer_needs_nothing(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    code, out, err = await cli("allocate", vm.monitor_path, "vd0")
    assert (code, err) == (0, "")
    assert "0 bytes allocated from below, 0 reserved" in out
    code, _, err = await cli("allocate", vm.monitor_path, "vd0", "--offset", "1T")
    assert code == 2
    assert "not inside the disk" in err


@pytest.mark.parametrize("fmt", ["parallels", "vdi"])
async def test_formats_for_which_nothing_happens_are_refused_by_name(
    fmt, start_qemu, invariant, vm_dir, qemu_binary
):
    """Their images record no backing image, but QEMU takes one on its command line."""
    text = "about: Two.\ndisks:\n- images: [{size: 8M, content: [write 0 1M 0x11]}]\n"
    text += f"- images: [{{format: {fmt}, size: 8M}}]\n"
    built = await build(parse_scenario(text, fmt), vm_dir / "images", Tools.of(qemu_binary))
    base, over = built.disks
    over = dataclasses.replace(over, active=dataclasses.replace(over.active, backing=base.active))
    try:
        vm = await start_qemu([over])
    except qmpblock.Error as error:
        assert "does not support backing files" in str(error) or "backing" in str(error)
        return
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert len(disk.chain.layers) == 2
        with pytest.raises(UnsupportedError, match=fmt) as caught:
            await disk.allocate()
        assert caught.value.standing == "nothing was touched"


@pytest.mark.scenarios("qcow2-data-file.yaml")
async def test_an_unplug_in_the_middle_does_not_kill_qemu(
    scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    """The image has then no writer, and QEMU writes to it all the same (K4)."""
    vm, every = await started(scenario, "d0", start_qemu, vm_dir, qemu_binary)
    [subject] = every.values()
    await subject.keeps_writing()
    await subject.writer.stop()
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(subject.path)
        told = []

        def tell(progress):
            told.append(progress.done)

        work = asyncio.ensure_future(disk.allocate(speed=Speed(512 << 10), progress=tell))
        while not any(told):
            await asyncio.sleep(0.01)
        await faults.unplug(vm, "d0")
        await asyncio.wait([work])
        with pytest.raises(qmpblock.Error):
            work.result()
        assert vm.running, vm.evidence()
        await vm.execute("query-status")
    invariant.forget(vm)  # its disk has gone
    await nothing_of_ours(vm)
    await vm.quit()


async def throttled(disk, *, length=None, rate=2 * MIB):
    """Start a slow allocation, and return it when it is in the middle."""
    told, speed = [], Speed(rate)

    def tell(progress):
        told.append((asyncio.get_running_loop().time(), progress.done))

    work = asyncio.ensure_future(disk.allocate(0, length, speed=speed, progress=tell))
    while len([done for _, done in told if done]) < 2:
        assert not work.done()
        await asyncio.sleep(0.01)
    return work, speed, told


async def test_a_foreign_snapshot_is_noticed(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(FULL_BASE, "full-base"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        work, _, _ = await throttled(disk)
        async with qmpblock.connect(vm.second_monitor_path) as other:
            overlay = vm_dir / "foreign.qcow2"
            await foreign_snapshot(vm, overlay)
            with pytest.raises(GraphError, match="snapshot") as caught:
                await work
            assert "what was allocated by then stays" in caught.value.standing
            [again] = await other.disks()
            assert again.chain.active.node.name == "foreign"
        await nothing_of_ours(vm)
    invariant.forget(vm)  # it has another chain now


async def foreign_snapshot(vm, overlay):
    tools = Tools.of(vm.command[0])
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(overlay), "32M")
    await vm.execute(
        "blockdev-add",
        driver="qcow2",
        node_name="foreign",
        backing=None,
        file={"driver": "file", "filename": str(overlay)},
    )
    await vm.execute("blockdev-snapshot", node="d0", overlay="foreign")


async def test_a_speed_holds_and_can_be_changed(start_qemu, invariant):
    vm = await start_qemu(parse_scenario(FULL_BASE, "full-base"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        work, speed, told = await throttled(disk, rate=4 * MIB)
        while told[-1][1] < 12 * MIB:
            await asyncio.sleep(0.01)
        first = next(when for when, done in told if done)
        assert (told[-1][1] - told[0][1]) / (told[-1][0] - first) < 8 * MIB
        speed.rate = 1  # it would take a year
        await asyncio.sleep(2)
        assert not work.done()
        speed.rate = 0
        result = await asyncio.wait_for(work, 60)
        assert result.allocated == 32 * MIB


async def test_an_interrupt_leaves_what_was_done(start_qemu, vm_dir, qemu_binary, invariant):
    """At every seventh command; what is allocated by then stays, and nothing of ours."""
    built = await build(parse_scenario(FULL_BASE, "x"), vm_dir / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    vm = await start_qemu(built, guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        number, interrupted = 1, True
        while interrupted:
            work = asyncio.ensure_future(disk.allocate(number % 32 * MIB, MIB))
            with at_command(controller.monitor, number, work.cancel):
                await asyncio.wait([work])
            interrupted = work.cancelled()
            await nothing_of_ours(vm)
            number += 7
        assert work.result().rounded_length == MIB
    await vm.quit()
    assert await content(built.disks[0].active, built.tools) == before


@pytest.mark.parametrize("full", [False, True])
async def test_independent(full, start_qemu, vm_dir, qemu_binary, invariant):
    """Nothing below is needed any more; blank stays blank, or gets space."""
    built = await build(blank(), vm_dir / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    vm = await start_qemu(built, guest=True)
    words = ["--independent", *(["--full"] if full else [])]
    code, _, err = await cli("allocate", vm.monitor_path, "vd0", *words)
    assert code == 0, err
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert len(disk.chain.layers) == 1
        assert bool((await disk.map()).holes()) == (not full)
    invariant.forget(vm)  # the backing image has gone: as asked
    await nothing_of_ours(vm)
    await vm.quit()
    active = dataclasses.replace(built.disks[0].active, backing=None)
    (vm_dir / "images" / "d0-0.qcow2").unlink()
    assert await content(active, built.tools) == before
    await active.check(built.tools)


@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_what_the_guest_writes_to_meanwhile(fmt, start_qemu, qemu_binary, invariant):
    """A sample of what soak does in 200 rounds."""
    count, chance = rounds(4)
    vm = await start_qemu(blank(fmt), guest=True)
    invariant.forget(vm)  # the pivots of its rounds leave QEMU's own traces
    done = await allocations_under_stress(vm, Tools.of(qemu_binary), chance, count)
    assert done.total() == count
