"""Backups that tests of what is made of them have: what a point file says of them."""

import zlib

from qmpblock.backups.point import BackedUpVM, DiskBackup, Point
from qmpblock.names import backup_bitmap

BACKUPS = "0123abcd"
SIZE = 64 << 20


def disk(
    name, file, *, parent=None, size=SIZE, persistent=True, bitmap="some", source="/i/d0.qcow2"
):
    """Return the backup of a disk."""
    return DiskBackup(
        disk=name,
        path=f"/machine/peripheral/{name}",
        size=size,
        source=source,
        format="qcow2",
        file=file,
        parent=parent,
        reason="" if parent else "it was asked for",
        length=1000,
        modified=1,
        digest="0" * 64,
        copied=10,
        encrypted=False,
        bitmap=bitmap,
        persistent=persistent,
    )


def point(when, disks, number=0, name="web", uuid=""):
    """Return a backup; `when`: 20261130T110500Z, say."""
    digits = when.ljust(15, "0")
    time = f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}T{digits[9:11]}:{digits[11:13]}:00.250+00:00"
    if not when[:1].isdecimal():
        time = "2026-11-30T00:00:00+00:00"
    which = f"{number:08x}" if number else f"{zlib.crc32(when.encode()):08x}"
    return Point(BACKUPS, which, when, time, BackedUpVM(name, uuid), tuple(disks))


def bitmap_of(one, number=0):
    """Return the name of the bitmap of a disk of a backup."""
    return backup_bitmap(one.backups, one.id, number)
