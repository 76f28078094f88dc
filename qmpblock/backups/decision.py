"""What a backup of a disk is to be: an increment, and of what; or full, and why. Pure.

An increment is right where four things are known, each by what proves it:

- what was written to the disk since a backup: the bitmap of that backup is on the active layer,
  consistent, and records;
- that this is all of it: the bitmap of the disk's end, which vouches for it, still holds that. A
  disk that was made smaller has lost it, and whatever else lay there, though it may be as large
  as before (F43); so has a bitmap that records on in an overlay, where it began empty;
- that what the active layer lies on holds what it did (`qmpblock.backups.lower`): what is changed
  there while the VM is off no bitmap tells;
- that what it is to lie on is what it was (`broken`).

Where one is not known, the backup is full. That is never wrong, and says why.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qmpblock.backups.lower import why_changed
from qmpblock.backups.point import DiskBackup, LowerFile, Point
from qmpblock.errors import UNTOUCHED, RequestError, printable
from qmpblock.graph.model import Bitmap
from qmpblock.names import backup_bitmap, end_bitmap, open_bitmap

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice

__all__ = ["Decision", "Kind", "SeenDisk", "check_vm", "decide", "fallen_back", "parents_wanted"]

Kind = Literal["full", "incremental"]

_NO_UUID = ("", "unknown", "00000000-0000-0000-0000-000000000000")


@dataclass(frozen=True)
class SeenDisk:
    """A disk as it is now.

    :ivar disk: what people call it; `path`: in QEMU's object tree.
    :ivar bitmaps: of its active layer.
    :ivar below: the names of those of the layers below.
    :ivar sources: the files of those layers.
    :ivar lower: all that the active layer lies on; None: nobody looked.
    """

    disk: str
    path: str
    size: int
    source: str
    bitmaps: tuple[Bitmap, ...]
    below: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    lower: tuple[LowerFile, ...] | None = None

    @classmethod
    def of(cls, device: DiskDevice, lower: tuple[LowerFile, ...] | None = None) -> SeenDisk:
        """Return what is seen of a disk."""
        active, *below = device.chain.layers
        return cls(
            device.name,
            device.qom_path,
            active.size,
            active.file,
            active.node.bitmaps,
            frozenset(one.name for layer in below for one in layer.node.bitmaps),
            frozenset(layer.file for layer in below),
            lower,
        )

    def without(self, names: Container[str]) -> SeenDisk:
        """Return it as it will be once bitmaps of these names are gone."""
        return replace(self, bitmaps=tuple(one for one in self.bitmaps if one.name not in names))

    def bitmap(self, name: str) -> Bitmap | None:
        """Return a bitmap of its active layer; None where there is none of that name."""
        return next((one for one in self.bitmaps if one.name == name), None)


@dataclass(frozen=True)
class Decision:
    """What the backup of a disk is to be.

    :ivar parent: on which it lies; None: it is full.
    :ivar bitmap: of what was written since that; empty where it is full.
    :ivar reason: why it is full; empty where it is not.
    :ivar fell_back: whether an increment was to be expected.
    """

    disk: SeenDisk
    parent: DiskBackup | None = None
    bitmap: str = ""
    reason: str = ""
    fell_back: bool = False

    @property
    def kind(self) -> Kind:
        """What it is to be."""
        return "full" if self.parent is None else "incremental"

    @property
    def written(self) -> int | None:
        """Bytes that an increment holds, at most, by what its bitmaps say; None: it is full."""
        if self.parent is None:
            return None
        both = (self.disk.bitmap(self.bitmap), self.disk.bitmap(end_bitmap(self.bitmap)))
        return min(self.disk.size, sum(one.count for one in both if one is not None))


def parents_wanted(points: Sequence[Point], disk: SeenDisk) -> tuple[DiskBackup, ...]:
    """Return of which backups an increment could be, by the bitmaps that there are, newest first.

    :param points: in their order.
    """
    return tuple(one for one, name in _backups_of(points, disk) if disk.bitmap(name) is not None)


def decide(
    points: Sequence[Point],
    disk: SeenDisk,
    broken: Mapping[str, str],
    kind: Kind | None = None,
) -> Decision:
    """Say what the backup of a disk is to be.

    :param points: of the directory, in their order.
    :param broken: of images that an increment could lie on, by their files: what is wrong with
        one, or with what it lies on in turn.
    :param kind: what is asked for; None: an increment where it can be.
    :raise RequestError: an increment is asked for, and cannot be; nothing was touched.
    """
    if kind == "full":
        return Decision(disk, reason="it was asked for")
    if not disk.size:
        return Decision(disk, reason="it has no bytes")
    reasons = []
    backups = _backups_of(points, disk)
    for one, name in backups:
        why = _why_not(disk, one, name) or broken.get(one.file)
        if why is None:
            return Decision(disk, one, name)
        reasons.append(why)
    reason = reasons[0] if reasons else "there is no backup of this disk yet"
    if kind == "incremental":
        raise RequestError(
            f"the backup of {disk.disk} cannot be incremental: {reason}",
            standing=UNTOUCHED,
            remedy="have it be full: leave --incremental out, or say --full",
        )
    return Decision(disk, reason=reason, fell_back=bool(backups))


def fallen_back(decisions: Iterable[Decision], verb: str = "is") -> tuple[str, ...]:
    """Warn of backups that are full where an increment was to be expected.

    :param verb: `is`, or `would be` of one that is not made.
    """
    return tuple(
        f"the backup of {one.disk.disk} {verb} full: {one.reason}"
        for one in decisions
        if one.fell_back
    )


def _backups_of(points: Sequence[Point], disk: SeenDisk) -> list[tuple[DiskBackup, str]]:
    """Return the backups of a disk, newest first, and how the bitmap of each is called."""
    return [
        (one, backup_bitmap(point.backups, point.id, number))
        for point in reversed(points)
        for number, one in enumerate(point.disks)
        if one.path == disk.path
    ]


def _why_not(disk: SeenDisk, backup: DiskBackup, name: str) -> str | None:
    """Say why it is not known what was written to a disk since a backup; None where it is."""
    if disk.size != backup.size:
        return f"the disk has {disk.size} bytes, and had {backup.size} at the last backup"
    found, end = disk.bitmap(name), disk.bitmap(end_bitmap(name))
    if found is None:
        return _why_gone(disk, backup, name)
    for one in (found, end):
        if one is not None and one.inconsistent:
            return (
                f"QEMU or its host died since the last backup, so its dirty bitmap "
                f"{printable(one.name)} does not tell all that was written"
            )
        if one is not None and one.busy:
            return f"somebody else uses the dirty bitmap {printable(one.name)}"
    if not found.recording:
        return f"somebody stopped the dirty bitmap {printable(name)}"
    if end is None or not end.count:
        return (
            f"the dirty bitmap {printable(name)} does not tell all that was written since the last "
            "backup: the disk was made smaller meanwhile, or another image lies below it since"
        )
    opened = disk.bitmap(open_bitmap(name))
    # Somebody may have made that persistent on its way to another QEMU: then it proves nothing.
    stayed_open = not found.persistent or (opened is not None and not opened.persistent)
    return why_changed(backup.lower, disk.lower, stayed_open=stayed_open)


def _why_gone(disk: SeenDisk, backup: DiskBackup, name: str) -> str:
    if not backup.bitmap:
        return "no dirty bitmap could be made at the last backup"
    if name in disk.below:
        return (
            "a snapshot was taken since the last backup: its dirty bitmap is in a layer below, and "
            "knows nothing of what was written since"
        )
    gone = f"the dirty bitmap of the last backup, {printable(name)}, is not there"
    if not backup.persistent:
        return (
            f"{gone}: QEMU was started anew, and the image, {backup.format}, did not keep it; or "
            "another image was put there"
        )
    return (
        f"{gone}: QEMU or its host died since, an older state or another image was put there, or "
        "somebody removed it"
    )


def _has_bitmap(points: Sequence[Point], disk: SeenDisk) -> bool:
    """Whether a layer of a disk has the bitmap of one of its backups."""
    return any(
        disk.bitmap(name) is not None or name in disk.below for _, name in _backups_of(points, disk)
    )


def check_vm(
    points: Sequence[Point], name: str, uuid: str, disks: Sequence[SeenDisk], directory: str
) -> None:
    """Refuse a directory whose backups are of another VM.

    By the UUID, where both have one. Where not, a bitmap of one of the backups proves it to be the
    same, else the name; else one of its images. Both may be in a layer below: somebody has taken a
    snapshot since.

    :param disks: all of this VM, for what was backed up last may have been others.
    :raise RequestError: it is another one, or that cannot be told.
    """
    if not points:
        return
    last = points[-1].vm
    known = last.uuid not in _NO_UUID and uuid not in _NO_UUID
    if known:
        same = last.uuid == uuid
        why = f"of the VM with the UUID {printable(last.uuid)}, and this one has {printable(uuid)}"
    elif any(_has_bitmap(points, disk) for disk in disks):
        return
    elif last.name and name:
        same = last.name == name
        why = f"of the VM {printable(last.name)}, and this one is called {printable(name)}"
    else:
        sources = {one.source for point in points for one in point.disks}
        same = any(sources & {disk.source, *disk.sources} for disk in disks)
        why = "of a VM without UUID and name that had none of this VM's images"
    if not same:
        raise RequestError(
            f"the backups in {printable(directory)} are {why}",
            standing=UNTOUCHED,
            remedy="name a directory for this VM alone; a new one is made",
        )
