"""Backups of VMs that are reached by another way than a monitor on this host for us alone."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from chains import cli
from fleecing import MIB, begin_writing, ran
from proxmox import DISK, daemons, monitor, started

from qmpblock.backups import read_points
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

ONE = "about: A disk.\nimages: [{size: 16M, content: [write 0 6M 0xbb]}]"
SPEC = StressSpec(
    offset=8 * MIB, blocks=2048, block_size=4096, queue_depth=4, seed=5, rate=100, flush_every=50
)


async def backed_up(vm, place, address, *words):
    """Make the next backup, restore it, and see that it is what the guest had written."""
    async with vm.guest.bounds(0) as bounds:
        code, out, err = await cli("backup", address, place, *words)
    assert code == 0, err
    [one] = read_points(place)[-1].disks
    target = place.parent / f"restored-{len(read_points(place))}"
    assert (await cli("restore", place, target))[0] == 0
    raw = target / "content.raw"
    [image] = target.iterdir()
    code, out = await ran("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert code == 0, out
    found = check_point_in_time(raw.read_bytes()[8 * MIB :], SPEC, bounds[0])
    assert found.ok, found
    return one


@pytest.mark.needs_qemu(">= 10.0", reason="views: nobody is held until others have had their turn")
async def test_by_turns(start_qemu, vm_dir, qemu_binary, invariant):
    """For who keeps Proxmox VE away himself; its daemons are answered all the time."""
    vm, _ = await started(start_qemu, vm_dir, qemu_binary, ONE, guest=True)
    invariant.forget(vm)  # bitmaps stay
    await begin_writing(vm, SPEC, first=1)
    place, kinds = vm_dir / "backups", []
    with daemons(vm_dir):
        code, _, err = await cli("backup", monitor(vm_dir), place)
        assert (code, place.exists(), "vzdump 104" in err) == (2, False, True), err
        for _ in range(3):
            one = await backed_up(vm, place, monitor(vm_dir), "--unmanaged")
            assert one.disk == DISK
            kinds.append(one.kind)
    assert kinds == ["full", "incremental", "incremental"]


async def test_on_another_host(start_qemu, vm_dir, invariant, ssh_host):
    """Nothing is made here; what is said to do there does it."""
    vm = await start_qemu(parse_scenario(ONE, "one"), guest=True)
    await begin_writing(vm, SPEC, first=1)
    place, address = vm_dir / "backups", ssh_host.address(vm)
    for words in (("backup", address, place), ("copy", address, "vd0", vm_dir / "copy.qcow2")):
        code, _, err = await cli(*words)
        assert (code, "nothing was touched" in err, place.exists()) == (2, True, False)
        remedy = err.partition("run it there: ")[2].strip()
        *ssh, command = shlex.split(remedy)
        assert ssh == ["ssh", "-p", "2222", f"root@{ssh_host.there}"]
        assert shlex.split(command) == [
            "qmpblock",
            words[0],
            vm.monitor_path,
            *map(str, words[2:]),
        ]
    invariant.forget(vm)
    code, *_ = await cli("backup", address, place, "--dry-run")
    assert (code, place.exists()) == (2, False)
    python = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')} {sys.executable} -m qmpblock"
    there = f"cd {Path.cwd()} && {python} backup {vm.monitor_path} {place}"
    code, out = await ran(*ssh, there)
    assert code == 0, out
    assert [one.kind for one in read_points(place)[-1].disks] == ["full"]
