"""Host space for a disk whose node makes zero clusters of zeros: detect-zeroes on and unmap."""

import pytest
from allocating import at_command, blank, content, without_space
from chains import subjects
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.allocation import filling
from qmpblock.changes import nodes
from qmpblock.errors import Error
from qmpblock.ranges import Ranges
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

MIB = 1 << 20
AT = 8 * MIB  # where nothing is
STRESS = StressSpec(
    offset=AT, blocks=1024, block_size=4096, queue_depth=8, seed=5, flush_every=50, read_percent=20
)
DISK = """
about: A disk that detects zeros.
attach: {ATTACH, discard: unmap, detect_zeroes: VALUE}
images:
  - {size: 32M, content: [write 0 1M 0xaa]}
  - {format: FORMAT, size: 32M, content: [write 1M 64K 0xbb, zero 2M 1M]}
"""
ATTACHMENTS = {
    "blockdev": "style: blockdev",
    "drive": "style: drive, node_names: false",
    "iothread": "style: blockdev, iothread: one",
    "throttled": "style: blockdev, filters: [throttle]",
}


def scenario(fmt="qcow2", attachment="blockdev", value="unmap"):
    text = DISK.replace("FORMAT", fmt).replace("VALUE", value)
    return parse_scenario(text.replace("ATTACH", ATTACHMENTS[attachment]), "detects-zeros")


async def detect_zeroes(vm):
    """Return the option of the active format node: the only one that is writable."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    fmt = vm.disks[0].active.spec.format
    [node] = [one for one in nodes if one["drv"] == fmt and not one["ro"]]
    return node["detect_zeroes"]


@pytest.mark.parametrize("value", ["on", "unmap"])
@pytest.mark.parametrize(
    ("fmt", "attachment"),
    [("qcow2", name) for name in ATTACHMENTS] + [("qed", "blockdev")],
)
async def test_full(fmt, attachment, value, start_qemu, vm_dir, qemu_binary, invariant):
    built = await build(scenario(fmt, attachment, value), vm_dir / "images", Tools.of(qemu_binary))
    [subject] = (await subjects(built, vm_dir)).values()
    before = await content(built.disks[0].active, built.tools)
    vm = await start_qemu(built, guest=True)
    await invariant.begin(vm)
    assert await detect_zeroes(vm) == value
    background = 0
    if fmt == "qed":
        # QEMU may abort when it drains a QED image while the guest writes to new clusters.
        background = 0xFF
        await vm.guest.fill(0, STRESS.offset, STRESS.length, background)
    await vm.guest.stress(STRESS)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with at_command(controller.monitor, 0, None) as trace:
            result = await disk.allocate(full=True)
    # Writable, off, and back: each slice three; and it puts three nodes upon others.
    assert trace.count("human-monitor-command") == 3 * trace.count("transaction")
    assert trace.count("blockdev-reopen") == 3 * trace.count("transaction")
    assert "stop" not in trace
    assert result.reserved > 16 * MIB, result
    assert await detect_zeroes(vm) == value
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await nothing_of_ours(vm)
    await invariant.verify(vm)
    # What the option is for works as before.
    file = built.disks[0].active.path
    full = file.stat().st_blocks
    await vm.guest.fill(0, 24 * MIB, 4 * MIB, 0)
    freed = (full - file.stat().st_blocks) * 512
    assert freed == (4 * MIB if (fmt, value) == ("qcow2", "unmap") else 0)
    await vm.quit()
    left = await without_space(subject, built.tools)
    zeros = Ranges([(24 * MIB, 28 * MIB)])
    assert left - zeros == Ranges(), "no host space"
    found = await content(built.disks[0].active, built.tools)
    area = slice(STRESS.offset, STRESS.offset + STRESS.length)
    verdict = check_acknowledged(
        found[area], STRESS, done.acked, done.issued, background=background
    )
    assert verdict.ok, verdict
    assert found[: area.start] == before[: area.start]
    assert found[area.stop :] == before[area.stop :]
    await built.disks[0].active.check(built.tools)


async def test_left_on_it_would_reserve_nothing(start_qemu, vm_dir, qemu_binary, monkeypatch):
    """So the tests above can fail: QEMU makes zero clusters of the zeros."""

    async def nothing(*_):
        pass

    monkeypatch.setattr(filling, "set_detect_zeroes", nothing)
    built = await build(scenario(), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    blocks = built.disks[0].active.path.stat().st_blocks
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(Error, match="did not store 8388608 bytes") as caught:
            await disk.allocate(16 * MIB, 8 * MIB, full=True)
    assert "nothing of ours is left" in caught.value.standing
    assert (built.disks[0].active.path.stat().st_blocks - blocks) * 512 < 2 * MIB
    assert await detect_zeroes(vm) == "unmap"


async def test_nodes_whose_option_cannot_be_set(start_qemu, vm_dir, qemu_binary, invariant):
    built = await build(blank(), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        with pytest.raises(Error, match=r"does not set detect-zeroes of no\.such to off: .*such"):
            await nodes.set_detect_zeroes(controller, "no.such", "off")
        with pytest.raises(Error, match="cannot be put on a command line"):
            await nodes.set_detect_zeroes(controller, 'd0 "help"', "off")
        with pytest.raises(Error, match=r"does not make no\.such writable: .*such"):
            await nodes.set_writable(controller, "no.such")
