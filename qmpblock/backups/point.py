"""One backup, as its point file says: of which disks it is, in which files, and what these lie on.

The file is JSON, stamped as all that is written for the next controller (`qmpblock.versioned`), and
lies beside its images. That it is there, under its name, is what makes the backup one. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qmpblock.errors import NotFoundError, RequestError, printable
from qmpblock.names import is_run, is_when
from qmpblock.versioned import UnreadableError, plain, read, stamped, unstamped

__all__ = [
    "BackedUpVM",
    "DiskBackup",
    "Image",
    "LowerFile",
    "Point",
    "every_image",
    "find_point",
    "image_names",
    "images_of",
    "is_image_name",
    "nearest_with",
    "restored_format",
    "restored_names",
    "when_of",
]

_RESTORED = ("qcow2", "raw")  # formats
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")  # for a file's name, which QEMU takes for no protocol
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST = 100  # characters of a disk's name in that of its file
_MOST = 200  # characters of a file's name


@dataclass(frozen=True)
class BackedUpVM:
    """The VM whose disks are backed up.

    :ivar name: its own; empty where it has none.
    :ivar uuid: zeros where it has none.
    """

    name: str
    uuid: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LowerFile:
    """A file that the active layer of a disk lies on, as it was when a backup was begun.

    :ivar file: as QEMU calls it.
    :ivar format: of the layer that it is of; `size`: of that, in bytes, as what lies on it sees it;
        `offset`: at which the layer begins in it, where it is a part of it.
    :ivar told: `seen`; `unseen`: it is on no file system of this host, say, so nothing tells
        whether it is changed; `elsewhere`: it was replaced, renamed or removed since QEMU opened
        it.
    :ivar length: bytes of it; `modified`: when it was written to last, in nanoseconds since 1970;
        `inode`: its number on its file system. Zeros where it is not seen.
    """

    file: str
    format: str
    size: int
    offset: int
    told: str
    length: int = 0
    modified: int = 0
    inode: int = 0
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class DiskBackup:
    """One disk in a backup.

    :ivar disk: what people call it; `path`: in QEMU's object tree.
    :ivar size: of the disk, in bytes.
    :ivar source: the file of its active layer; `format`: of that.
    :ivar file: of its image, in the directory.
    :ivar parent: the file on which that lies, likewise; None: it holds all.
    :ivar reason: why it holds all; empty where it does not.
    :ivar length: bytes of the image's file; `modified`: when it was written to last, in nanoseconds
        since 1970; `digest`: blake2b of 256 bits, of the whole file.
    :ivar copied: bytes that QEMU's job went over.
    :ivar encrypted: whether the image is, with the disk's key.
    :ivar bitmap: the dirty bitmap, in the VM, by which the next one can be an increment; empty
        where there is none; `persistent`: whether it outlives QEMU.
    :ivar lower: the files that the active layer lies on, from above; None: nobody noted it.
    """

    disk: str
    path: str
    size: int
    source: str
    format: str
    file: str
    parent: str | None
    reason: str
    length: int
    modified: int
    digest: str
    copied: int
    encrypted: bool
    bitmap: str
    persistent: bool
    lower: tuple[LowerFile, ...] | None = None
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def kind(self) -> str:
        """`full` or `incremental`."""
        return "full" if self.parent is None else "incremental"


@dataclass(frozen=True)
class Point:
    """One backup.

    :ivar backups: the id of the directory: of all backups in it.
    :ivar id: of this one; `when`: what its files are called, by the time at which it was begun.
    :ivar time: of the instant of which it is, in UTC (ISO 8601), by its host's clock.
    :ivar number: of this one in the directory, by which they are in order: a clock may be set back.
    """

    backups: str
    id: str
    when: str
    time: str
    vm: BackedUpVM
    disks: tuple[DiskBackup, ...]
    number: int = 0
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_json(self) -> dict[str, Any]:
        """Return the document of docs/schema/backup-point.schema.json."""
        return stamped(
            plain(self) | {"vm": plain(self.vm), "disks": [_plain(one) for one in self.disks]}
        )

    @classmethod
    def from_json(cls, document: object, when: str) -> Point:
        """Read what `as_json` returned, of whatever version.

        :param when: what its file is called.
        :raise UnreadableError: it is not that.
        """
        point = read(cls, unstamped(document))
        if not (is_run(point.backups) and is_run(point.id)):
            raise UnreadableError("its ids are none")
        if point.when != when:
            raise UnreadableError(f"it says that it is called {printable(point.when)}")
        if not point.disks:
            raise UnreadableError("it is of no disk")
        try:
            moment = datetime.fromisoformat(point.time)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise UnreadableError("its time is none")
        for one in point.disks:
            _check(one)
        return point

    @property
    def moment(self) -> datetime:
        """The instant of which it is."""
        return datetime.fromisoformat(self.time)

    def has(self, name: str) -> bool:
        """Whether it has a disk of that name."""
        return any(name in (one.disk, one.path) for one in self.disks)

    def disk(self, name: str, remedy: str | None = None) -> DiskBackup:
        """Return one of its disks.

        :param remedy: what is to be done where it has none of that name.
        :raise NotFoundError: it has none.
        """
        for one in self.disks:
            if name in (one.disk, one.path):
                return one
        raise NotFoundError(
            f"the backup {self.when} has no disk {printable(name)}; it has:",
            [one.disk for one in self.disks],
            remedy=remedy,
        )


@dataclass(frozen=True)
class Image:
    """One image file of a directory of backups.

    :ivar point: of which it is.
    """

    point: Point
    backup: DiskBackup

    @property
    def file(self) -> str:
        """Its name in the directory."""
        return self.backup.file


def _plain(one: DiskBackup) -> dict[str, Any]:
    lower = None if one.lower is None else [plain(file) for file in one.lower]
    return plain(one) | {"lower": lower}


def _check(one: DiskBackup) -> None:
    """See that what a point file says can be: whoever wrote it may have been anybody.

    :raise UnreadableError: it cannot.
    """
    for name in (one.file, *([] if one.parent is None else [one.parent])):
        if not is_image_name(name):
            raise UnreadableError(f"{printable(name)} is the name of no image in a directory")
    if one.parent == one.file:
        raise UnreadableError(f"{one.file} is said to lie on itself")
    if min(one.size, one.length, one.copied) < 0 or not _DIGEST.fullmatch(one.digest):
        raise UnreadableError(f"what it says of {one.file} is not possible")


def every_image(points: Iterable[Point]) -> dict[str, Image]:
    """Return all images of which backups tell, by their names in the directory. Pure."""
    return {one.file: Image(point, one) for point in points for one in point.disks}


def images_of(every: Mapping[str, Image], file: str) -> tuple[Image, ...]:
    """Return an image and those that it lies on, itself first. Pure.

    :param every: image of the directory (`every_image`).
    :raise RequestError: no backup tells of one of them, or they lie on each other.
    """
    chain: dict[str, Image] = {}  # there may be thousands
    above, name = "", file
    while True:
        if name not in every:
            raise RequestError(
                f"no backup tells of {printable(name)}"
                + (f", on which {printable(above)} lies" if above else ""),
                remedy="its point file (WHEN.json) is gone: bring it back, or take an older backup",
            )
        if name in chain:
            raise RequestError(f"{printable(name)} is said to lie on itself")
        chain[name] = every[name]
        parent = every[name].backup.parent
        if parent is None:
            return tuple(chain.values())
        above, name = name, parent


def find_point(points: Sequence[Point], at: str | None) -> Point:
    """Return the backup that somebody means. Pure.

    :param points: in their order.
    :param at: what it is called (WHEN), or a time in ISO 8601, local where it does not say: the
        newest one that is not younger; None: the newest.
    :raise RequestError: the word is neither.
    :raise NotFoundError: there is none.
    """
    listed = [point.when for point in points]
    if not points:
        raise NotFoundError("there is no backup there")
    if at is None:
        return points[-1]
    for point in points:
        if at in (point.when, point.id):
            return point
    if is_when(at) and "-" in at:
        raise NotFoundError(f"there is no backup {at}; there are:", listed)
    try:
        moment = datetime.fromisoformat(at).astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestError(
            f"{printable(at)} is neither a backup's name nor a time such as 2026-11-30T11:05",
        ) from None
    older = [point for point in points if point.moment <= moment]
    if not older:
        raise NotFoundError(f"there is no backup as old as {printable(at)}; there are:", listed)
    return max(older, key=lambda point: point.moment)


def nearest_with(points: Sequence[Point], point: Point, name: str) -> Point | None:
    """Return the backup that has a disk which another one has not: before it, else after it. Pure.

    :param points: in their order, the other one among them.
    :return: None: no backup has it.
    """
    at = points.index(point)
    nearest = [*reversed(points[:at]), *points[at + 1 :]]
    return next((one for one in nearest if one.has(name)), None)


def when_of(moment: datetime, taken: Iterable[str]) -> str:
    """Return what a backup is called that begins at that time, and that no other is. Pure."""
    when = f"{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}"
    names = set(taken)
    number = 1
    while (name := when if number == 1 else f"{when}-{number}") in names:
        number += 1
    return name


def is_image_name(name: str) -> bool:
    """Whether an image of a backup can be called so: a file in its directory, and no other. Pure.

    Whatever reads of such a name does so in a file that anybody may have written.
    """
    return 0 < len(name) <= _MOST and not (_UNFIT.search(name) or name.startswith("."))


def image_names(when: str, disks: Sequence[str]) -> list[str]:
    """Return what the images of disks are called. Pure.

    :param disks: what people call them, who may call them anything.
    """
    return _names([f"{when}-{_fit(disk)}" for disk in disks], ["qcow2"] * len(disks))


def restored_format(one: DiskBackup) -> str:
    """Return the format in which a disk is restored: that which it had, if that can be. Pure."""
    return one.format if one.format in _RESTORED else "qcow2"


def restored_names(disks: Sequence[DiskBackup]) -> list[str]:
    """Return what disks are called that are restored. Pure."""
    return _names([_fit(one.disk) for one in disks], [restored_format(one) for one in disks])


def _fit(disk: str) -> str:
    return _UNFIT.sub("_", disk).strip("._-")[-_LONGEST:].lstrip("._-") or "disk"


def _names(stems: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Return names of files, no two of which are one."""
    names: list[str] = []
    for stem, fmt in zip(stems, formats, strict=True):
        number = 1
        while (name := f"{stem}{'' if number == 1 else f'-{number}'}.{fmt}") in names:
            number += 1
        names.append(name)
    return names
