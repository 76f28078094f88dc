"""Copies of disks that are large and hold next to nothing: no job goes over what is not there."""

import subprocess
from pathlib import Path

import pytest

import qmpblock
from qmpblock.copying import held, targetfile
from qmpblock.errors import BusyError, JobError
from qmpblock.testing.images import Tools
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

HUGE = "about: A large disk.\nimages: [{size: 2T, content: [write 1T 64K 0xaa]}]\n"


@pytest.mark.parametrize("at", ["end", "start"])
async def test_it_takes_what_it_holds(at, start_qemu, vm_dir, qemu_binary):
    """QEMU's progress is of what is to be copied, and not of the whole disk."""
    vm = await start_qemu(parse_scenario(HUGE, "huge"))
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(target, at=at, format="qcow2") as job:
            pass
    assert job.result.disks[0].size == 2 << 40
    # Of a view also its beginning: see copying/held.py.
    assert 64 << 10 <= job.result.disks[0].copied <= 2 << 20
    await vm.quit()
    tools = Tools.of(qemu_binary)
    source = vm.disks[0].active.path
    command = [tools.img, "compare", "-f", "qcow2", "-F", "qcow2", str(source), str(target)]
    subprocess.run(command, check=True)


SPARSE = """\
about: A large disk of two layers.
images:
  - {size: 16G, content: [write 5G 1M 0xcc, write 9G 1M 0xdd]}
  - {size: 16G, content: [write 1G 1M 0xaa, write 3G 1M 0xbb, write 9G 64K 0xee]}
"""


@pytest.fixture
async def sparse(start_qemu, invariant, vm_dir, qemu_binary):
    """Yield a VM with that disk, and what it held, as a raw image."""
    vm = await start_qemu(parse_scenario(SPARSE, "sparse"))
    await invariant.begin(vm)
    tools, before = Tools.of(qemu_binary), vm_dir / "before"
    active = vm.disks[0].active.path
    words = ["convert", "-U", "-f", "qcow2", "-O", "raw", str(active), str(before)]
    subprocess.run([tools.img, *words], check=True)
    return vm, tools, before


def same(tools, one, other, fmt):
    """Whether two images hold the same; the second is raw."""
    words = ["compare", "-U", "-f", fmt, "-F", "raw", str(one), str(other)]
    return (
        subprocess.run([tools.img, *words], check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


def meddling(monkeypatch, vm, before=(), between=(), error=None):
    """Have the guest write before, and after, the disk itself was asked where it holds anything."""
    real, asked = held._not_zero, []

    async def meddled(client):
        first = not asked
        asked.append(client)
        for command in before if first else ():
            await vm.qemu_io(vm.disks[0], command)
        found = await real(client)
        for command in between if first else ():
            await vm.qemu_io(vm.disks[0], command)
        if error is not None:
            raise error
        return found

    monkeypatch.setattr(held, "_not_zero", meddled)
    return asked


WRITES = (
    ["write -z -u 5G 1M", "write -z 1G 1M", "aio_write -P 0x11 7G 1M"],
    ["write -z -u 3G 1M", "write -z -u 9G 64K", "aio_write -P 0x22 11G 64K"],
)


@pytest.mark.needs_qemu(">= 10.0", reason="before, frozen layers are copied")
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_what_the_guest_zeroes_while_it_is_asked_for_is_copied(
    fmt, sparse, vm_dir, monkeypatch, invariant
):
    """Whatever comes between the point and the questions, and between these: what was there."""
    vm, tools, before = sparse
    asked = meddling(monkeypatch, vm, *WRITES)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(vm_dir / "copy", at="start", format=fmt) as job:
            pass
    assert len(asked) == 2
    assert job.result.disks[0].copied <= 16 << 20
    assert same(tools, vm_dir / "copy", before, fmt)
    assert (vm_dir / "copy").stat().st_blocks * 512 < 32 << 20
    await invariant.verify(vm)


@pytest.mark.needs_qemu(">= 10.0", reason="before, frozen layers are copied")
async def test_asked_in_the_other_order_it_would_be_lost(sparse, vm_dir, monkeypatch):
    """So that the test above can fail."""
    vm, tools, before = sparse
    real = held.exports

    def turned(monitor, device, requests, **words):
        return real(monitor, device, list(reversed(requests)), **words)

    monkeypatch.setattr(held, "exports", turned)
    meddling(monkeypatch, vm, *WRITES)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(vm_dir / "copy", at="start", format="raw"):
            pass
    assert not same(tools, vm_dir / "copy", before, "raw")


@pytest.mark.needs_qemu(">= 10.0", reason="before, frozen layers are copied")
async def test_where_it_cannot_be_told_all_is_copied(sparse, vm_dir, monkeypatch, invariant):
    vm, tools, before = sparse
    asked = meddling(monkeypatch, vm, error=BusyError("somebody else's"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(vm_dir / "copy", at="start", format="qcow2") as job:
            pass
    assert len(asked) == 1
    assert job.result.disks[0].copied == 16 << 30
    assert same(tools, vm_dir / "copy", before, "qcow2")
    await invariant.verify(vm)


@pytest.mark.needs_qemu(">= 10.0", reason="before, frozen layers are copied")
async def test_a_point_that_ended_before_it_was_asked_is_no_copy(
    start_qemu, vm_dir, monkeypatch, invariant
):
    """All that the disk held was overwritten, and could not be kept: nothing tells of it."""
    text = "about: One piece.\nimages: [{size: 16G, content: [write 1G 16M 0xaa]}]\n"
    vm = await start_qemu(parse_scenario(text, "piece"))
    await invariant.begin(vm)
    meddling(monkeypatch, vm, before=["write -z 1G 16M"])
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(JobError):
            async with disk.copy(vm_dir / "copy", at="start", format="qcow2", fleece_limit=5 << 20):
                pass
    assert not Path(vm_dir / "copy").exists()
    await invariant.verify(vm)


@pytest.mark.needs_qemu(">= 10.0", reason="before, a disk of one layer needs no more than that")
async def test_a_raw_copy_reserves_nothing_that_is_given_back_hole_by_hole(
    start_qemu, vm_dir, monkeypatch, qemu_binary, invariant
):
    content = ", ".join(f"write {at}M 64K 0xaa" for at in range(0, 64, 2))
    text = f"about: Scattered.\nimages: [{{size: 64M, content: [{content}]}}]\n"
    vm, punched, target = await start_qemu(parse_scenario(text, "scattered")), [], vm_dir / "copy"
    await invariant.begin(vm)
    real = targetfile.punch_hole
    monkeypatch.setattr(targetfile, "punch_hole", lambda *at: punched.append(at) or real(*at))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(target, at="start", format="raw") as job:
            pass
    assert len(punched) <= 1  # of the beginning, which is always gone over
    assert job.result.disks[0].copied <= 32 * (64 << 10) + (1 << 20)
    tools, active = Tools.of(qemu_binary), vm.disks[0].active.path
    assert same(tools, active, target, "qcow2")
    await invariant.verify(vm)
