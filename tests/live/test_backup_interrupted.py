"""Signals to `qmpblock backup` and `restore`, at steps of theirs: what is said of them is so."""

import os
import shutil

import pytest
from chains import cli
from signalled import SIGNALS, signalled

from qmpblock.backups import read_points
from qmpblock.names import BACKUP_LOCK_FILE, point_file

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

STAYS = r"appeared: bitmap: qmpblock-backup-[0-9a-f]{8}-[0-9a-f]{8}-\d(-end|-open)? of d0, .*"


def tidy(place):
    """Whether there is nothing in a directory but the backups."""
    points = read_points(place)
    known = {one.file for point in points for one in point.disks} | {BACKUP_LOCK_FILE}
    return set(os.listdir(place)) == known | {point_file(point.when) for point in points}


@pytest.mark.parametrize(
    ("after", "made"),
    [
        ("qmpblock.backups.run:_Run._bitmaps", False),
        ("qmpblock.backups.run:_Run._copy", False),
        ("qmpblock.backups.directory:Backups.make", True),
        ("qmpblock.backups.run:delete_bitmaps", True),
        ("qmpblock.backups.run:_Run._release", True),
    ],
)
async def test_a_backup_is_made_or_it_is_not(after, made, scenario, start_qemu, vm_dir, invariant):
    """One that is made is one, and is said to be: nothing of it is undone."""
    vm, place = await start_qemu(scenario), vm_dir / "backups"
    invariant.expect(STAYS)
    backup = ("backup", vm.monitor_path, place)
    assert (await cli(*backup))[0] == 0
    for count, (number, times) in enumerate(SIGNALS, 1):
        code, out, err = await signalled(after, number, times, *backup)
        assert code == (0 if made else 130), err
        assert len(read_points(place)) == 1 + count * made
        assert ("is made, in" in out, "too late to give it up" in err) == (made, made)
        assert tidy(place)
    code, out, err = await cli(*backup, "--incremental")
    assert code == 0, err


@pytest.mark.parametrize(
    ("after", "done"),
    [
        ("qmpblock.backups.restore:_prove", False),
        ("qmpblock.backups.restore:_Target.name_it", True),
        ("qmpblock.host.ourfiles:Directory.sync", True),
    ],
)
async def test_a_file_is_replaced_or_it_is_not(
    after, done, scenario, start_qemu, vm_dir, invariant
):
    vm, place, target = await start_qemu(scenario), vm_dir / "backups", vm_dir / "restored"
    invariant.expect(STAYS)
    assert (await cli("backup", vm.monitor_path, place))[0] == 0
    for number, times in SIGNALS:
        target.mkdir()
        file = target / "vd0.qcow2"
        file.write_bytes(b"before")
        words = ("restore", place, target, "--force")
        code, out, err = await signalled(after, number, times, *words)
        assert code == (0 if done else 130), err
        assert (file.read_bytes() == b"before", "restored to" in out) == (not done, done)
        assert [path.name for path in target.iterdir()] == ["vd0.qcow2"]
        assert "VM" not in err  # there is none
        shutil.rmtree(target)


async def test_of_a_check_no_vm_is_spoken(scenario, start_qemu, vm_dir, invariant):
    vm, place = await start_qemu(scenario), vm_dir / "backups"
    invariant.expect(STAYS)
    assert (await cli("backup", vm.monitor_path, place))[0] == 0
    after = "qmpblock.backups.check:_being_made"
    for number, times in SIGNALS:
        code, out, err = await signalled(after, number, times, "backup", "check", place)
        assert (code, out) == (130, ""), err
        assert "interrupted; nothing of ours is left" in err
        assert "VM" not in err
