"""Image files of a running VM that are on this host too, and what of them has host space.

Which file is the VM's, its own descriptors tell (`qmpblock.host.openfiles`).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.graph.places import FileId, Missing, Place
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.ourfiles import open_plain

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer
    from qmpblock.ranges import Ranges

__all__ = [
    "home_of",
    "local_path",
    "open_inodes",
    "reserved_ranges",
    "status_of",
    "why_not_local",
]

# linux/fiemap.h, linux/fs.h
_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQLLLL")  # start, length, flags, mapped extents, extent count, reserved
_EXTENT = struct.Struct("=QQQQQLLLL")  # logical, physical, length, 2 reserved, flags, 3 reserved
_LAST = 0x1
_UNWRITTEN = 0x800
_BATCH = 1024
_SYNC = 0x1  # FIEMAP_FLAG_SYNC


def local_path(pid: int | None, layer: Layer) -> str | None:
    """Return a path on this host to the layer's image file, or None.

    :param pid: the process at the other end of the monitor.
    """
    place = _place(pid, layer)
    return place.here if isinstance(place, Place) and not place.file.is_device else None


def home_of(path: str) -> str:
    """Return the name of an image beside which others look for it, whatever link they came by.

    That is its real one; the given one where that leads elsewhere (/proc/PID/root).
    """
    real = Path(os.path.realpath(path))
    return str(real) if real.exists() and real.samefile(path) else path


def why_not_local(pid: int | None, layer: Layer) -> str:
    """Say why `local_path` returned None, in words that follow the file's name."""
    place = _place(pid, layer)
    if isinstance(place, Missing):
        return place.reason
    return "is a block device" if place.file.is_device else "has just come to be known here"


def status_of(pid: int | None, layer: Layer) -> os.stat_result | None:
    """Return stat(2) of the very file that the layer is stored in; None where it is not here."""
    place = _place(pid, layer)
    if isinstance(place, Missing):
        return None
    for fd in OpenFiles(pid).descriptors(place.file):
        try:
            status = Path(f"/proc/{pid}/fd/{fd}").stat()
        except OSError:
            continue
        if FileId.of(status) == place.file:
            return status
    return None


def _place(pid: int | None, layer: Layer) -> Place | Missing:
    if layer.storage is None:
        return Missing("has no file of its own")
    return OpenFiles(pid).place(layer.storage)


def open_inodes(pid: int) -> set[tuple[int, int]]:
    """Return the device and inode of every file that a process has open, as far as we may look."""
    return {(one.device, one.inode) for one in OpenFiles(pid).ids() if one.inode is not None}


def reserved_ranges(path: str, size: int, *, first: int = 0, sync: bool = False) -> Ranges | None:
    """Return the ranges of a file that are fallocated but not written, in bytes.

    To QEMU they are holes; only FIEMAP tells (F4). Reads metadata only.

    :param size: of the disk; what the file holds past it does not count.
    :param first: where to begin.
    :param sync: write back what is in the page cache first: until then, what is written to a
        reserved range counts as not written.
    :return: None where the file system cannot tell.
    """
    from qmpblock.ranges import Ranges

    found: list[tuple[int, int]] = []
    position = first
    try:
        fd = open_plain(path)
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
                if flags & _UNWRITTEN and logical < size:
                    found.append((max(logical, first), min(position, size)))
            if count == 0 or flags & _LAST:
                break
    finally:
        os.close(fd)
    return Ranges(found)
