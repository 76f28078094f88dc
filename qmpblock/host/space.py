"""Host space: what of a file has it, and how much it can be given, by the kernel's word.

How large a disk is, its monitor says, which may be answered by whoever runs it. What is reserved
on that word takes host space from everybody, so it has to be possible first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.errors import Error, RequestError, printable
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.ourfiles import open_plain

if TYPE_CHECKING:
    from qmpblock.ranges import Ranges
    from qmpblock.sizes import Amount

__all__ = [
    "HostSpace",
    "blank_ranges",
    "check_reservable",
    "end_of",
    "holes",
    "open_image",
    "reserved_ranges",
    "shared_ranges",
]

# linux/fiemap.h, linux/fs.h
_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQLLLL")  # start, length, flags, mapped extents, extent count, reserved
_EXTENT = struct.Struct("=QQQQQLLLL")  # logical, physical, length, 2 reserved, flags, 3 reserved
_LAST = 0x1
_UNWRITTEN = 0x800
_SHARED = 0x2000
_BATCH = 1024
_SYNC = 0x1  # FIEMAP_FLAG_SYNC

_SECTOR = 512  # bytes; a raw disk is its file, rounded up to whole ones
_NOTHING = "nothing was reserved"


@dataclass(frozen=True)
class HostSpace:
    """The free space of a file system of this host. All in bytes.

    Not to be confused with a disk's room, which its image has already
    (`qmpblock.allocation.room`).

    :ivar path: of a file there.
    :ivar device: the file system's number.
    :ivar free: how much there is for us.
    :ivar keep: how much must stay so.
    """

    path: str
    device: int
    free: int
    keep: int = 0

    @classmethod
    def of(cls, path: str, keep: Amount | None = None) -> HostSpace:
        """Look at the file system of a file.

        :param keep: what must stay free; a share is one of the whole file system.
        :raise OSError: there is no such file.
        """
        seen = os.statvfs(path)
        kept = 0 if keep is None else keep.of(seen.f_blocks * seen.f_frsize)
        return cls(path, Path(path).stat().st_dev, seen.f_bavail * seen.f_frsize, kept)

    def now(self) -> HostSpace:
        """Look at it again.

        :raise OSError: the file is gone.
        """
        return replace(HostSpace.of(self.path), keep=self.keep)

    def leaves(self, taken: int) -> bool:
        """Whether as much as must stay free would, if so much were taken."""
        return self.free - taken >= self.keep


def end_of(place: int | str) -> int:
    """Return where a disk ends that a file holds from its beginning on, byte by byte.

    :param place: the file's path, or its descriptor.
    :raise OSError: there is no such file.
    """
    return -(-os.stat(place).st_size // _SECTOR) * _SECTOR  # noqa: PTH116  it may have no path


def check_reservable(
    file: str,
    pid: int,
    ranges: Sequence[tuple[int, int]],
    *,
    fd: int | None = None,
    grows: bool = False,
) -> None:
    """Refuse to reserve what cannot be had, however much room is made.

    :param file: its name; what is looked at where there is no descriptor.
    :param pid: of the VM's process.
    :param ranges: of the file, (start, stop) in bytes.
    :param grows: whether the file may become longer by what it is given.
    :raise RequestError: the ranges reach beyond the end of the file, together they are more than
        its file system, or beyond what that process may write.
    :raise Error: the file cannot be looked at.
    """
    place = file if fd is None else fd
    amount = sum(stop - start for start, stop in ranges)
    last = max((stop for _, stop in ranges), default=0)
    try:
        end, filesystem = end_of(place), os.statvfs(place)
    except OSError as error:
        raise Error(
            f"cannot look at {printable(file)}: {error.strerror}", standing=_NOTHING
        ) from None
    if last > end and not grows:
        raise RequestError(
            f"by what the VM says its disk reaches to byte {last} of {printable(file)}, which "
            f"ends at byte {end}: no space is reserved there",
            standing=_NOTHING,
            remedy="see how large the VM says that the disk is: qmpblock disks ADDRESS; where the "
            "file was cut, give it that size again",
        )
    most = (
        filesystem.f_blocks * filesystem.f_frsize
    )  # some that have no bound, or none to tell, say 0
    if amount > most > 0:
        raise RequestError(
            f"{amount} bytes would be reserved in {printable(file)}, whose file system is of "
            f"{most} bytes in all",
            standing=_NOTHING,
            remedy="ask for less, or move the image to a larger file system first",
        )
    largest = _largest_file(pid)
    if largest is not None and last > largest:
        raise RequestError(
            f"the VM's process {pid} may write to no more than the first {largest} bytes of a file "
            f"(RLIMIT_FSIZE), and up to byte {last} of {printable(file)} would be reserved",
            standing=_NOTHING,
            remedy=f"raise its limit (prlimit --pid {pid} --fsize=unlimited), or ask for less",
        )


def _largest_file(pid: int) -> int | None:
    """Return how many bytes of a file a process may write; None for no limit, or an unknown one."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # it has ended, which whoever borrows its file will say
    words = next((line.split() for line in lines if line.startswith("Max file size")), [])
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else None


def open_image(path: str, vm: int | None) -> int:
    """Open an image file, to ask the file system about it.

    :param vm: the process that has it open; None: none has.
    :raise OSError: it cannot be opened; or its name leads to what that process has not open.
    """
    return open_plain(path, among=None if vm is None else OpenFiles(vm).ids())


def reserved_ranges(
    path: str, size: int, *, vm: int | None = None, first: int = 0, sync: bool = False
) -> Ranges | None:
    """Return the ranges of a file that are fallocated but not written, in bytes.

    To QEMU they are holes; only FIEMAP tells (F4). Reads metadata only.

    :param size: of the disk; what the file holds past it does not count.
    :param vm: the process that has it open; None: none has.
    :param first: where to begin.
    :param sync: write back what is in the page cache first: until then, what is written to a
        reserved range counts as not written.
    :return: None where the file system cannot tell.
    """
    return _extents_with(_UNWRITTEN, path, size, vm=vm, first=first, sync=sync)


def shared_ranges(path: str, size: int) -> Ranges | None:
    """Return the ranges of a file whose blocks are another file's, too (reflinks), in bytes.

    :param size: of the file.
    :return: None where the file system cannot tell.
    """
    return _extents_with(_SHARED, path, size, sync=True)


def _extents_with(
    flag: int, path: str, size: int, *, vm: int | None = None, first: int = 0, sync: bool = False
) -> Ranges | None:
    from qmpblock.ranges import Ranges

    ranges: list[tuple[int, int]] = []
    position = first
    try:
        fd = open_image(path, vm)
    except OSError:
        return None
    try:
        buffer = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
        while position < size:
            want = _SYNC if sync else 0
            _HEADER.pack_into(buffer, 0, position, size - position, want, 0, _BATCH, 0)
            try:
                fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
            except OSError:
                return None
            count = _HEADER.unpack_from(buffer)[3]
            flags = 0
            for index in range(count):
                fields = _EXTENT.unpack_from(buffer, _HEADER.size + index * _EXTENT.size)
                logical, length, flags = fields[0], fields[2], fields[5]
                position = logical + length
                if flags & flag and logical < size:
                    ranges.append((max(logical, first), min(position, size)))
            if count == 0 or flags & _LAST:
                break
    finally:
        os.close(fd)
    return Ranges(ranges)


def holes(file: str, start: int, stop: int, *, vm: int | None = None) -> Ranges:
    """Return what holds no data between two offsets of a file, past its end included.

    What is reserved counts as a hole while it is neither written nor in the page cache, which
    it is when it was read, too.

    :param vm: the process that has it open; None: none has.
    """
    from qmpblock.ranges import Ranges

    ranges: list[tuple[int, int]] = []
    at = start
    fd = open_image(file, vm)
    try:
        while at < stop:
            try:
                data = min(os.lseek(fd, at, os.SEEK_DATA), stop)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = stop  # no data from here on
            if data > at:
                ranges.append((at, data))
            if data < stop:
                data = os.lseek(fd, data, os.SEEK_HOLE)
            at = data
    finally:
        os.close(fd)
    return Ranges(ranges)


def blank_ranges(file: str, start: int, size: int, *, vm: int | None = None) -> Ranges:
    """Return which bytes of a disk that lies in a file as it is have no host space.

    Metadata only: the file system's holes, less what it has reserved (FIEMAP). Where it cannot
    tell that, a file with as many blocks as bytes counts as full.

    :param start: where the disk begins in the file; what is returned counts from there.
    :param vm: the process that has it open; None: none has.
    """
    from qmpblock.ranges import Ranges

    stop = start + size
    empty = holes(file, start, stop, vm=vm)
    reserved = reserved_ranges(file, stop, vm=vm)
    if reserved is None:
        status = Path(file).stat()
        full = status.st_blocks * 512 >= max(stop, status.st_size)
        reserved = Ranges([(0, stop)]) if full else Ranges()
    left = empty - reserved
    return Ranges.from_arrays(left.starts - start, left.stops - start)
