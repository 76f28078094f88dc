"""Testing a directory of backups: all that can be told without the VM.

Of each image: that it is there, that every byte of it is what it was (its digest), that its header
is of the size and names the image below that its backup says, and that its tables are sound
(qemu-img check). A backup is whole where its images are, and all on which these lie.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.backups.directory import Backups, open_backups
from qmpblock.backups.imagefile import Proven
from qmpblock.backups.maker import maker
from qmpblock.backups.point import Image, Point, every_image, images_of
from qmpblock.copying.meter import Meter
from qmpblock.copying.partialfile import wrong_header
from qmpblock.errors import Error, RequestError, printable
from qmpblock.host.qemuimgcheck import QemuImgCheck
from qmpblock.names import BACKUP_LOCK_FILE, backup_when, point_file

if TYPE_CHECKING:
    from qmpblock.qemu.job import Progress

__all__ = ["BackupsChecked", "PointChecked", "UnderWay", "check_backups"]

_HEAD = 64 << 10  # bytes: the header of our images, with what it names


@dataclass(frozen=True)
class PointChecked:
    """What was found of one backup.

    :ivar faults: what is wrong with it; none: it is whole.
    """

    when: str
    time: str
    disks: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class UnderWay:
    """A backup that is being made while others are tested: it is none yet, and nothing is wrong.

    :ivar when: what it is going to be called; empty where that is not said yet.
    :ivar by: who makes it, for people.
    :ivar files: what there is of it by now, by their names in the directory.
    """

    when: str
    by: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class BackupsChecked:
    """What was found of a directory of backups.

    :ivar points: its backups, oldest first.
    :ivar unread: why point files cannot be read, where some cannot.
    :ivar others: what lies there and no backup tells of.
    :ivar read: bytes that were read.
    :ivar underway: the backup that is being made; None: there is none.
    """

    directory: str
    points: tuple[PointChecked, ...]
    unread: tuple[str, ...]
    others: tuple[str, ...]
    read: int
    seconds: float
    underway: UnderWay | None = None

    @property
    def whole(self) -> bool:
        """Whether every backup there is, and there is one."""
        return (
            bool(self.points) and not self.unread and not any(point.faults for point in self.points)
        )


async def check_backups(
    directory: str | os.PathLike[str],
    *,
    progress: Callable[[Progress], None] | None = None,
    stall: float = 60.0,
) -> BackupsChecked:
    """Test all backups in a directory, without their VM; nothing is written.

    Every byte of every image is read. Cancelling stops at once.

    :param progress: is told how far it is.
    :param stall: seconds in which qemu-img does nothing that count as a failure.
    :raise RequestError: there is no such directory.
    :raise ToolError: qemu-img is not here.
    """
    started = time.monotonic()
    with open_backups(directory) as backups:
        before = _being_made(backups)  # it may be made, or given up, by the end
        unread = tuple(error.message for error in backups.read().values())
        images = every_image(backups.points)
        meter = Meter("digesting", sum(one.backup.length for one in images.values()), progress)
        read = 0

        def tell(more: int) -> None:
            nonlocal read
            read += more
            meter.set(read)

        faults = {name: await _fault(backups, image, tell, stall) for name, image in images.items()}
        points = tuple(_checked(images, point, faults) for point in backups.points)
        known = {point_file(point.when) for point in backups.points} | set(images)
        # By now what was begun may have been made; or another one, from its beginning to its end.
        now, names = _being_made(backups), backups.names()
        backups.read()
        known |= {one.file for point in backups.points for one in point.disks}
        known |= {name for seen in (before, now) if seen is not None for name in seen.files}
        others = tuple(
            name
            for name in names
            if name not in known and name != BACKUP_LOCK_FILE and not _is_point(name)
        )
        if now is not None:
            now = _still(now, backups.points, names)
        return BackupsChecked(
            backups.path, points, unread, others, read, time.monotonic() - started, now
        )


def _still(seen: UnderWay, points: Sequence[Point], names: Sequence[str]) -> UnderWay | None:
    """Return it with what is there of it; None where it is made, and only has not ended yet."""
    if any(point.when == seen.when for point in points):
        return None
    return replace(seen, files=tuple(name for name in names if name in seen.files))


def _being_made(backups: Backups) -> UnderWay | None:
    """Return the backup that somebody is making there, with all that it may have there."""
    by = maker(backups.files)
    if by is None:
        return None
    begun = backups.begun()
    # What others left that died is swept away first, so that the last one is the one.
    files = tuple(name for names in begun.values() for name in names)
    return UnderWay(max(begun, default=""), by, files)


def _is_point(name: str) -> bool:
    said = backup_when(name)
    return said is not None and said[1]


async def _fault(
    backups: Backups, image: Image, tell: Callable[[int], None], stall: float
) -> str | None:
    """Say what is wrong with one image itself; None: nothing."""
    backup = image.backup
    try:
        fd = await Proven(backups, tell).open(image)
    except Error as error:
        return error.message
    try:
        head = os.pread(fd, _HEAD, 0)
        why = wrong_header(head, backup.size, backup.parent, encrypted=backup.encrypted)
        if why is None and not backup.encrypted:  # only its key would show
            place = backups.place(image.file)
            why = await QemuImgCheck(stall=stall).fault(place, "qcow2", opened={place: fd})
    except (OSError, RequestError) as error:
        why = error.message if isinstance(error, Error) else f"cannot be read: {error.strerror}"
    finally:
        os.close(fd)
    return None if why is None else f"{image.file}: {why}"


def _checked(
    images: Mapping[str, Image], point: Point, faults: Mapping[str, str | None]
) -> PointChecked:
    found: list[str] = []
    for one in point.disks:
        try:
            chain = images_of(images, one.file)
        except Error as error:
            found.append(f"{printable(one.disk)}: {error.message}")
            continue
        for image in chain:
            fault = faults[image.file]
            if fault is not None and fault not in found:
                found.append(fault)
    return PointChecked(
        point.when, point.time, tuple(one.disk for one in point.disks), tuple(found)
    )
