"""Image files of a running VM that are on this host too.

A file name that QEMU reports means nothing here unless QEMU runs here, and in the same view
of the file system: under another mount namespace the same name may be another file. So a
file counts as the VM's only where the QEMU process has that very inode open.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.graph import Layer

if TYPE_CHECKING:
    from qmpblock.ranges import Ranges

__all__ = ["local_path", "open_inodes", "reserved_ranges", "same_files"]

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
    storage = layer.storage
    if pid is None or storage is None or storage.driver != "file":
        return None
    try:
        held = list(_open_files(pid))
    except OSError:
        return None  # no such process here, or not ours to look at
    # QEMU may have changed its directory since it opened a relative name (-daemonize); but it
    # has the file open, so the one open file that ends in that name is the one.
    tail = "/" + storage.filename.removeprefix("./")
    named = {path for path, _ in held if path == storage.filename or path.endswith(tail)}
    inodes = {inode for path, inode in held if path in named}
    if len(inodes) != 1:
        return None
    for path in sorted(named):
        try:
            status = Path(path).stat()
        except (OSError, ValueError):
            continue  # another view of the file system, or unlinked
        if (status.st_dev, status.st_ino) in inodes:
            return path
    return None


def open_inodes(pid: int) -> set[tuple[int, int]]:
    """Return the device and inode of every file that a process has open, as far as we may look."""
    try:
        return {inode for _, inode in _open_files(pid)}
    except OSError:
        return set()


def same_files(pid: int | None) -> bool:
    """Whether a process sees the same file system as this one: a path means the same to both."""
    if pid is None:
        return False
    try:
        return Path(f"/proc/{pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
    except OSError:
        return False


def _open_files(pid: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the path and the inode of everything that a process has open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            status = entry.stat()
            yield str(entry.readlink()), (status.st_dev, status.st_ino)
        except OSError:
            continue  # closed since it was listed


def reserved_ranges(path: str, size: int, *, first: int = 0, sync: bool = False) -> Ranges | None:
    """Return the ranges of a file that are fallocated but not written, in bytes.

    To QEMU they are holes; only FIEMAP tells (qemu-facts 11.1). Reads metadata only.

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
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
