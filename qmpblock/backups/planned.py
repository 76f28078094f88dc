"""What a backup would be: of each disk what kind and why, how it is made, what that takes. Pure.

The bytes are those of now: of a full one by the disk's map, of an increment by the count of its
dirty bitmap, zeros included. What the guest writes until it is made comes on top.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.backups.decision import Decision, Kind, fallen_back

if TYPE_CHECKING:
    from qmpblock.copying.planned import PlannedCopy, PlannedDisk, Room, Way

__all__ = ["PlannedBackup", "PlannedDiskBackup", "planned_backup"]


@dataclass(frozen=True)
class PlannedDiskBackup:
    """One disk that would be backed up.

    :ivar disk: what people call it.
    :ivar source: the file of its active layer.
    :ivar kind: `full` or `incremental`; `reason`: why it is full; empty where it is not.
    :ivar parent: the file, in the directory, on which an increment lies; None: it holds all.
    :ivar target: the image, as it is called if the backup begins now; `format`: its.
    :ivar size: of the disk, in bytes.
    :ivar read: bytes to be read, at the most: of a full one zeros left out, of an increment what
        was written since its parent; None where no map can be had, see the warnings.
    :ivar write: bytes to be written to the image, likewise.
    :ivar room: that the image needs; None where it cannot be said.
    :ivar kept: where goes what the guest overwrites meanwhile, or (frozen layers) what it writes,
        and how much that may take, or must find free.
    """

    disk: str
    source: str
    kind: Kind
    reason: str
    parent: str | None
    target: str
    format: str
    size: int
    read: int | None
    write: int | None
    room: Room | None
    kept: Room | None


@dataclass(frozen=True)
class PlannedBackup:
    """A backup that is possible now, and was not begun. Get it from `VM.plan_backup`.

    :ivar directory: of the backups, absolute; `new`: whether it would be made.
    :ivar when: what the backup is called if it begins now.
    :ivar way: how the images would be made (`PlannedCopy`); `why` this way.
    :ivar guest: what the guest would feel.
    :ivar speed: bytes a second, of all disks; 0 is no limit.
    :ivar seconds: how long the copy takes at that speed; None at no limit, or where it cannot be
        said.
    :ivar verify: whether the images would be compared with their instant.
    :ivar warnings: what is worth acting on.
    """

    directory: str
    new: bool
    when: str
    way: Way
    why: str
    guest: tuple[str, ...]
    disks: tuple[PlannedDiskBackup, ...]
    speed: int = 0
    seconds: float | None = None
    verify: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def write(self) -> int | None:
        """Bytes to be written, of all disks; None where of one it cannot be said."""
        known = [one.write for one in self.disks if one.write is not None]
        return sum(known) if len(known) == len(self.disks) else None


def planned_backup(
    directory: str,
    when: str,
    decisions: Sequence[Decision],
    copied: PlannedCopy,
    *,
    new: bool,
) -> PlannedBackup:
    """Say what a backup would be.

    :param decisions: on each disk; `copied`: how they would be copied, in the same order.
    """
    return PlannedBackup(
        directory,
        new,
        when,
        copied.way,
        copied.why,
        copied.guest,
        tuple(
            _planned(directory, one, disk)
            for one, disk in zip(decisions, copied.disks, strict=True)
        ),
        copied.speed,
        copied.seconds,
        copied.verify,
        (*fallen_back(decisions, "would be"), *copied.warnings),
    )


def _planned(directory: str, decision: Decision, disk: PlannedDisk) -> PlannedDiskBackup:
    return PlannedDiskBackup(
        disk.disk,
        disk.source,
        decision.kind,
        decision.reason,
        None if decision.parent is None else decision.parent.file,
        posixpath.join(directory, posixpath.basename(disk.target)),
        disk.format,
        disk.size,
        disk.read,
        disk.write,
        disk.room,
        disk.kept,
    )
