"""Backups: chains of copies over time, each of all its disks at one instant, in a directory.

They are made by `VM.backup`; what is here needs no VM.
"""

from __future__ import annotations

from qmpblock.backups.check import BackupsChecked, PointChecked, UnderWay, check_backups
from qmpblock.backups.directory import read_points
from qmpblock.backups.point import BackedUpVM, DiskBackup, LowerFile, Point
from qmpblock.backups.restore import DiskRestored, Restored, restore

__all__ = [
    "BackedUpVM",
    "BackupsChecked",
    "DiskBackup",
    "DiskRestored",
    "LowerFile",
    "Point",
    "PointChecked",
    "Restored",
    "UnderWay",
    "check_backups",
    "read_points",
    "restore",
]
