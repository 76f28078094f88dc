"""What a copy would be: how it is done on this QEMU and why, and what it takes. Pure.

The bytes are those of the disk's map as it is now. What the guest writes until the copy is over
comes on top, of a copy of the end; of the start it goes to what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qmpblock.copying.plan import CopyPlan, Point
from qmpblock.copying.shape import metadata_of
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.copying.options import CopyOptions
    from qmpblock.extents.allocationmap import AllocationMap

__all__ = [
    "Amounts",
    "PlannedCopy",
    "PlannedDisk",
    "Room",
    "Way",
    "amounts",
    "amounts_since",
    "felt",
    "lacking",
    "seconds",
    "way_of",
    "why",
]

Way = Literal["views", "frozen layers", "mirrors"]

_UNIT = 64 << 10  # bytes that a job copies at least


@dataclass(frozen=True)
class Room:
    """What is needed of a file system of this host. All in bytes.

    :ivar path: of the directory.
    :ivar needed: at the most.
    :ivar free: how much there is for us.
    """

    path: str
    needed: int
    free: int


@dataclass(frozen=True)
class PlannedDisk:
    """One disk that would be copied.

    :ivar disk: what people call it.
    :ivar source: the file of its active layer.
    :ivar target: the file, device or URI.
    :ivar format: of the target.
    :ivar size: of the disk, in bytes.
    :ivar read: bytes to be read, zeros left out; None where no map can be had, see the warnings.
    :ivar write: bytes to be written to the target; None likewise.
    :ivar room: that the target needs; None where it is no file, or it cannot be said.
    :ivar kept: where goes what the guest overwrites meanwhile, or (frozen layers) what it writes,
        and how much that may take, or must find free; None where nothing has to be kept.
    :ivar relayed: whether the bytes go through this process, to an NBD server.
    """

    disk: str
    source: str
    target: str
    format: str
    size: int
    read: int | None
    write: int | None
    room: Room | None
    kept: Room | None
    relayed: bool = False


@dataclass(frozen=True)
class PlannedCopy:
    """A copy that is possible now, and was not begun. Get it from `VM.plan_copy`.

    :ivar point: of which moment it would be.
    :ivar way: how it would be done; `why` this way.
    :ivar guest: what the guest would feel.
    :ivar speed: bytes a second, of all disks; 0 is no limit.
    :ivar seconds: how long it takes at that speed; None at no limit, or where it cannot be said.
    :ivar verify: whether the copies would be compared with their point.
    :ivar warnings: what is worth acting on.
    """

    point: Point
    way: Way
    why: str
    guest: tuple[str, ...]
    disks: tuple[PlannedDisk, ...]
    speed: int = 0
    seconds: float | None = None
    verify: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def read(self) -> int | None:
        """Bytes to be read, of all disks; None where of one it cannot be said."""
        return _sum([one.read for one in self.disks])

    @property
    def write(self) -> int | None:
        """Bytes to be written, of all disks; None where of one it cannot be said."""
        return _sum([one.write for one in self.disks])


def _sum(parts: Sequence[int | None]) -> int | None:
    known = [one for one in parts if one is not None]
    return sum(known) if len(known) == len(parts) else None


# -- bytes


@dataclass(frozen=True)
class Amounts:
    """What the copy of one disk moves. All in bytes.

    :ivar read: data; `write`: that in whole units.
    :ivar paced: what QEMU counts for the speed.
    :ivar taken: of the target's file system, at the most.
    """

    read: int
    write: int
    paced: int
    taken: int


def amounts(
    plan: CopyPlan, options: CopyOptions, way: Way, seen: AllocationMap, reserved: int = 0
) -> Amounts:
    """Say what a copy moves.

    :param seen: what the guest sees of the whole disk.
    :param reserved: bytes that the target is to have in any case.
    """
    depth = None if plan.backing is None else 0
    data = seen.where(depth=depth, present=True, zero=False)
    unit = max(_UNIT, plan.shape.unit) if plan.format == "qcow2" else _UNIT
    write = data.align_out(unit, plan.size).total
    over = plan.size
    if plan.asks and (way == "views" or (way != "mirrors" and plan.sync_of_disk == "full")):
        over = plan.gone_over(data).total
    if way == "mirrors":
        paced = write  # a mirror counts no zeros, though its progress does
    elif (plan.sync if way == "views" else plan.sync_of_disk) == "full":
        paced = over  # a backup does
    else:
        paced = seen.where(depth=0, present=True).align_out(unit, plan.size).total
    return Amounts(data.total, write, paced, max(reserved, _taken(plan, options, write, over)))


def amounts_since(plan: CopyPlan, written: int) -> Amounts:
    """Say what the copy of an increment moves, at the most.

    :param written: bytes that its dirty bitmaps tell of; zeros are among them.
    """
    moved = min(plan.size, written)
    return Amounts(moved, moved, moved, _in_clusters(plan, moved))


def _taken(plan: CopyPlan, options: CopyOptions, write: int, over: int) -> int:
    if options.reflink:
        return metadata_of(plan.size, plan.shape.unit)  # the rest is the disk's own
    if plan.format == "raw":
        # A backup job reserves what it knows to be zeros; that is given back when it has ended.
        return over if options.point == "start" else write
    return _in_clusters(plan, write)


def _in_clusters(plan: CopyPlan, write: int) -> int:
    # Where each cluster lies may be in as many tables as would be for all of the disk.
    return plan.shape.room(plan.format, write) + plan.size // plan.shape.unit * 8


def seconds(paced: Sequence[int], speed: int) -> float | None:
    """Return how long copies take at once; None at no limit.

    :param paced: of each, what counts for the speed.
    :param speed: bytes a second, of all together, of which each gets the same share.
    """
    return max(paced) * len(paced) / speed if speed else None


def lacking(rooms: Sequence[tuple[int, Room]]) -> Iterator[str]:
    """Say of which file systems there is less free than targets need together.

    :param rooms: of each target, with the file system's number.
    """
    needed: dict[int, int] = {}
    for device, room in rooms:
        needed[device] = needed.get(device, 0) + room.needed
    for device, room in dict(rooms).items():
        if needed[device] > room.free:
            yield (
                f"the file system of {printable(room.path)} has {room.free} bytes free, and up to "
                f"{needed[device]} are taken there: it would have to wait for room, or be given up "
                "where the VM's images lie there, too"
            )


# -- how, and why


def way_of(point: Point, *, misread: bool) -> Way:
    """Say how it is done.

    :param misread: whether jobs of this QEMU may misread a view (K23).
    """
    if point != "start":
        return "mirrors"
    return "frozen layers" if misread else "views"


def why(way: Way, version: object, *, reflink: bool = False, managed: bool = False) -> str:
    """Say why it is done so.

    :param reflink: whether blocks are to be shared.
    :param managed: whether the manager copies, and has the guest go over.
    """
    if managed:
        return (
            "libvirt is to start the VM from the copies the next time, so it copies, by a "
            "background mirror, which is not in the guest's way, and has the guest go over"
        )
    if reflink:
        return (
            "blocks that are shared are those of the images themselves (--reflink): so these are "
            "frozen, and an overlay beside each image takes what the guest writes, and comes home "
            "at the end"
        )
    if way == "mirrors":
        return (
            "a copy of the end has to follow what the guest writes until then, which a background "
            "mirror does without being in the guest's way, on every QEMU"
        )
    if way == "views":
        return (
            f"QEMU {version} can have backup jobs read a point in time, which copy-before-write "
            "keeps: no target is in the guest's way"
        )
    return (
        f"QEMU {version}, as all before 10.0, may have a job that reads a point in time copy what "
        "was written later (K23): so the images are frozen, backup jobs read those, and an overlay "
        "beside each image takes what the guest writes, and comes home at the end"
    )


def felt(
    options: CopyOptions,
    way: Way,
    plans: Sequence[CopyPlan],
    *,
    pauses: bool,
    managed: bool = False,
) -> Iterator[str]:
    """Say what the guest feels.

    :param pauses: whether the VM is paused at the end.
    :param managed: as of `why`.
    """
    if way == "views":
        yield "its first write to each 64K waits until what was there is kept, 5 seconds at most"
        if len(plans) > 1:
            yield "the VM is paused for the instant at the start: milliseconds"
    elif way == "frozen layers":
        yield "its I/O is held for the instant at the start, and when the overlay comes home"
        yield (
            "should QEMU or the host die meanwhile, qmpblock recover IMAGE has to run before the "
            "VM is started again"
        )
    elif managed:
        yield "the VM is paused at the end until libvirt names the copies: milliseconds, as a rule"
    else:
        yield "its I/O is held for the instant at the end: milliseconds, 2 seconds at the most"
        if options.resume:
            yield (
                "where something is gone on from, the VM is paused once before, while the last of "
                "what that lacks is copied: some 100 ms, 2 seconds at the most"
            )
    if pauses:
        yield "the VM is paused for milliseconds at the end, for requests must not wait then (K26)"
    if options.latency:
        yield (
            f"the copy is no faster than lets its requests take {options.latency * 1e3:g} ms (on "
            "average; 99% of them where QEMU has latency histograms), and so may take longer"
        )
    if options.point == "pivot":
        yield "it is on the copies from then on: the old images are stale"
    if any(plan.server is not None for plan in plans):
        yield (
            "no server is in its way: the bytes go through qmpblock, which cuts off one that does "
            "not answer, after 5 seconds where the guest would wait"
        )
