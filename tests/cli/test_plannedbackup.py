"""The lines that say what a backup would be."""

from dataclasses import replace

from qmpblock.backups.planned import PlannedBackup, PlannedDiskBackup
from qmpblock.cli.plannedbackup import said
from qmpblock.copying.planned import Room

M = 1 << 20
DISK = PlannedDiskBackup(
    "vd0",
    "/i/d0",
    "full",
    "it was asked for",
    None,
    "/b/20261130T110500Z-vd0.qcow2",
    "qcow2",
    16 * M,
    2 * M,
    3 * M,
    Room("/b", 4 * M, 9 * M),
    Room("/i", 5 * M, 6 * M),
)
BACKUP = PlannedBackup(
    "/b", False, "20261130T110500Z", "views", "it is so", ("it waits",), (DISK,), 2 * M, 1.5
)


def test_a_full_one():
    assert list(said(BACKUP)) == [
        "vd0: would be backed up to 20261130T110500Z-vd0.qcow2, 16M, full: it was asked for",
        "  at most 2M to read, 3M to write; room: 4M in /b, where 9M are free",
        "  what the guest overwrites meanwhile is kept in /i, up to 5M; 6M are free",
        "by views: it is so",
        "the guest: it waits",
        "2 s at 2M/s",
        "in /b; files are called by the time at which it begins",
    ]


def test_an_increment():
    disk = replace(DISK, kind="incremental", reason="", parent="a.qcow2", kept=None)
    lines = list(said(replace(BACKUP, disks=(disk,), new=True, verify=True)))
    assert lines[0].endswith("16M, incremental, on a.qcow2; then compared with the disk")
    assert lines[-2] == "2 s at 2M/s; to compare it takes about as long again"
    assert lines[-1].startswith("in /b, which would be made; ")


def test_what_cannot_be_said():
    disk = replace(DISK, disk="\x1b", read=None, write=None, room=None)
    lines = list(said(replace(BACKUP, disks=(disk,), seconds=None, way="frozen layers")))
    assert lines[1] == "  how much there is to read cannot be told beforehand"
    assert "goes to an overlay in /i" in lines[2]
    assert not any("s at" in line for line in lines)
    assert not any("\x1b" in line for line in lines)
