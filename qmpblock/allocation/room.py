"""Write-ahead room: host space for what the guest is going to write, reserved before it does.

A thin disk takes its space from the host when the guest writes, and if there is none by then,
the guest gets an error. Room is space that is the image's already: reserved by fallocate(2) in
the file that the active layer is stored in, and not written yet. Where it lies depends on how
the format stores data (measured, 7.2 and 11.1, ext4)::

    grows at its end (qcow2, qed, qcow, vmdk, vdi, vpc, vhdx)

        |####### data and metadata #######|........ room ........|
        0                                 the file's size         stop
                                                     ^ threshold

    data at its place (raw, luks, a qcow2 data file): the lowest blank ranges are reserved

        |####...##....####......                 |    . room
        0               ^ threshold              the disk's size

Here is one pass, `make_room`; `qmpblock.allocation.watch` repeats it whenever the guest comes near
the end. It neither pauses the guest, nor changes content or size of the image.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qmpblock.allocation.rawfile import host_file, raw_file, reserve_ranges
from qmpblock.errors import UNTOUCHED, Error, RequestError, UnsupportedError, printable
from qmpblock.graph.model import Layer
from qmpblock.graph.writable import check_disk
from qmpblock.host.space import HostSpace, end_of, holes, reserved_ranges
from qmpblock.qemu import ownership
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk

__all__ = [
    "Place",
    "RoomPlan",
    "RoomResult",
    "Space",
    "fill",
    "find_place",
    "look",
    "look_at",
    "make_room",
    "missing",
    "plan_room",
    "result_of",
    "rounded_room",
    "threshold",
]

_GROWING = frozenset({"qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"})
# Whole blocks of any file system: what is rounded less could be short by a part of one for ever.
_UNIT = 64 << 10
_FAR = 1 << 60  # past the end of any file


@dataclass(frozen=True)
class RoomResult:
    """What there is of the room of a disk, and what was added. All in bytes.

    :ivar file: on this host, in which it lies.
    :ivar wanted: as asked, rounded up to 64 KiB.
    :ivar before: how much there was; None where the file system cannot tell.
    :ivar reserved: that the file takes more since.
    :ivar room: how much there is now; None where the file system cannot tell.
    :ivar full: whether no blank is left that could be reserved.
    :ivar error: why there is less than wanted, in a watch: it is tried again.
    """

    disk: str
    file: str
    wanted: int
    before: int | None
    reserved: int
    room: int | None
    full: bool = False
    error: Error | None = None


@dataclass(frozen=True)
class RoomPlan:
    """What `make_room` would do. All in bytes.

    :ivar file: on this host, in which it would lie.
    :ivar room: that there is; None where the file system cannot tell.
    :ivar reserve: to be reserved, at most.
    :ivar full: whether no blank would be left.
    """

    file: str
    wanted: int
    room: int | None
    reserve: int
    full: bool


@dataclass(frozen=True)
class Place:
    """Where the room of a disk is.

    :ivar file: on this host.
    :ivar pid: of the VM's process, which writes to it.
    :ivar layer: whose storage node is that of the file.
    :ivar start: where in the file the disk begins; None where the file grows at its end.
    :ivar size: of the disk.
    """

    file: str
    pid: int
    layer: Layer
    start: int | None
    size: int

    @property
    def node(self) -> str:
        """The node that writes to the file."""
        assert self.layer.storage is not None  # it has a local path
        return self.layer.storage.name


@dataclass(frozen=True)
class Space:
    """What a look at the file found; offsets are the file's.

    :ivar room: what is reserved and not written.
    :ivar blank: what could be reserved; None where that is all that lies past `end`.
    :ivar end: of the file.
    :ivar known: whether the file system told. If not, `room` is what we ourselves reserved.
    """

    room: Ranges
    blank: Ranges | None
    end: int = 0
    known: bool = True


# -- pure


def rounded_room(size: int) -> int:
    """Return how much room is made where `size` bytes are asked for.

    :raise RequestError: none.
    """
    if size <= 0:
        raise RequestError(f"{size} bytes of room are none", standing=UNTOUCHED)
    return -(-size // _UNIT) * _UNIT


def missing(space: Space, size: int) -> Ranges:
    """Return what is to be reserved, so that the room is `size` bytes.

    Less where no more is blank.
    """
    short = size - space.room.total
    if short <= 0:
        return Ranges()
    if space.blank is None:
        return Ranges([(space.end, space.end + size)]) - space.room
    return space.blank.lowest(short)


def threshold(room: Ranges, half: int) -> int | None:
    """Return the offset above which `half` bytes of the room lie; None where it has not as many.

    A write that ends beyond it may have left less than that.
    """
    lengths = (room.stops - room.starts)[::-1]
    above = np.cumsum(lengths)
    at = int(np.searchsorted(above, half))
    if half <= 0 or at == len(above):
        return None
    start = int(room.starts[::-1][at])
    return max(1, start + int(above[at]) - half)  # to QEMU 0 is none


# -- one look, one pass


async def find_place(disk: MappedDisk) -> Place:
    """Say where the room of a disk is.

    :raise UnsupportedError: it cannot have any, or not from here; nothing was touched.
    :raise DisconnectedError: QEMU has gone, which is why.
    """
    async with disk.vm.unless_gone():
        return await _place(disk)


async def _place(disk: MappedDisk) -> Place:
    check_disk(disk.device)
    active, pid = disk.chain.active, disk.vm.monitor.peer_pid or 0  # without one, no file is local
    if active.format in ("raw", "luks"):
        place = await raw_file(disk)
        assert place is not None  # it stores data as it is
        file, start = place
        return Place(file, pid, active, start, disk.size)
    if active.data_file is not None:
        # A guest's byte lies at its own offset there, whatever data_file_raw says.
        data = replace(active, storage=active.data_file)
        return Place(host_file(disk, data), pid, data, 0, disk.size)
    extents = any(edge.name.startswith("extents.") for edge in active.node.children)
    if active.format not in _GROWING or extents:
        several = " in several files" if extents else ""
        raise UnsupportedError(
            f"where a {printable(active.format)} image{several} grows is not known, so no room "
            "can be made ahead of it",
            standing=UNTOUCHED,
        )
    return Place(host_file(disk, active), pid, active, None, disk.size)


def look(place: Place, wanted: int, until: int = 0) -> Space:
    """Look at the file. Metadata only.

    :param wanted: bytes of room; where there seems to be less, what the guest wrote is written
        back first if that could tell more (until then it counts as reserved, see `Space`).
    :param until: up to where we have reserved, for a file system that cannot tell.
    :raise UnsupportedError: the file system cannot tell what is reserved inside a file.
    """
    if place.start is None:
        end = Path(place.file).stat().st_size
        ahead = reserved_ranges(place.file, _FAR, vm=place.pid, first=end)
        if ahead is not None:
            return Space(ahead, None, end)
        return Space(Ranges([(end, max(end, until))]), None, end, known=False)
    # What a VM says of its size counts no further than the file itself.
    start, stop = place.start, min(place.start + place.size, end_of(place.file))
    reserved = reserved_ranges(place.file, stop, vm=place.pid, first=start)
    blank = holes(place.file, start, stop, vm=place.pid)
    if reserved is not None:
        # What was written a moment ago is in the page cache only, and reserved to FIEMAP.
        certain = reserved & blank
        if certain.total < min(wanted, reserved.total):
            # So is what was read. Written back, FIEMAP tells them apart.
            reserved = reserved_ranges(place.file, stop, vm=place.pid, first=start, sync=True)
        else:
            reserved = certain
    if reserved is None:
        raise UnsupportedError(
            f"the file system of {printable(place.file)} cannot tell what is reserved (FIEMAP), so "
            "how much room there is cannot be told",
            standing=UNTOUCHED,
        )
    return Space(reserved, blank - reserved)


async def make_room(disk: MappedDisk, size: int, *, keep_free: Amount | None = None) -> RoomResult:
    """Have the disk's next `size` bytes reserved. See `Disk.make_room`."""
    wanted = rounded_room(size)
    await disk.refresh()
    await ownership.ask(disk.vm.monitor, [disk.device])
    place = await find_place(disk)
    before = await look_at(place, wanted)
    await ownership.ask(disk.vm.monitor, [disk.device])
    reserved, after = await fill(place, before, wanted, keep_free)
    return result_of(disk, place, wanted, before, reserved, after)


async def plan_room(disk: MappedDisk, size: int, coming: int = 0) -> RoomPlan:
    """Say what `make_room` would do. Changes nothing.

    :param coming: bytes inside the disk that will be reserved before.
    """
    wanted = rounded_room(size)
    place = await find_place(disk)
    space = await look_at(place, wanted)
    if space.blank is None:
        return RoomPlan(
            place.file,
            wanted,
            space.room.total if space.known else None,
            max(0, wanted - space.room.total),
            full=False,
        )
    room, blank = space.room.total, max(0, space.blank.total - coming)
    short = max(0, wanted - room - coming)
    return RoomPlan(place.file, wanted, room, min(short, blank), full=short >= blank)


async def look_at(place: Place, wanted: int, until: int = 0) -> Space:
    """Look at the file, in a thread: see `look`.

    :raise Error: it cannot be opened, say.
    """
    try:
        return await asyncio.to_thread(look, place, wanted, until)
    except OSError as error:
        raise Error(
            f"cannot look at {printable(place.file)}: {error.strerror}",
            standing=UNTOUCHED,
        ) from None


async def fill(
    place: Place, space: Space, size: int, keep_free: Amount | None
) -> tuple[int, Space]:
    """Reserve what is missing; return the bytes that the file takes more, and the look after.

    :raise Error: there is no room on the host for it; what was reserved by then stays.
    """
    todo = missing(space, size)
    if not todo:
        return 0, space
    if keep_free is not None:
        _check_free(place.file, keep_free, size - space.room.total)
    grows = place.start is None
    reserved = await reserve_ranges(place.file, place.pid, todo, speed=Speed(), grows=grows)
    until = int(todo.stops[-1]) if space.blank is None else 0
    return reserved, await look_at(place, size, until)


def _check_free(file: str, keep_free: Amount, needed: int) -> None:
    host = HostSpace.of(file, keep_free)
    if not host.leaves(needed):
        raise Error(
            f"{needed} bytes of room are missing in {printable(file)}, whose file system has "
            f"{host.free} bytes free, and {host.keep} are to stay so",
            standing="none was made",
            remedy="make room, or keep less free",
        )


def result_of(
    disk: MappedDisk, place: Place, wanted: int, before: Space, reserved: int, after: Space
) -> RoomResult:
    """Put what a pass did into words."""
    return RoomResult(
        disk.name,
        place.file,
        wanted,
        before.room.total if before.known else None,
        reserved,
        after.room.total if after.known else None,
        full=after.blank is not None and not after.blank,
    )
