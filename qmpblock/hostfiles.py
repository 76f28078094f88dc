"""Image files of a running VM that are on this host too.

A file name that QEMU reports means nothing here unless QEMU runs here, and in the same view
of the file system: under another mount namespace the same name may be another file. So a
file counts as the VM's only where the QEMU process has that very inode open.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.graph import Layer

if TYPE_CHECKING:
    from qmpblock.ranges import Ranges

__all__ = ["local_path", "reserved_ranges"]

# linux/fiemap.h, linux/fs.h
_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQLLLL")  # start, length, flags, mapped extents, extent count, reserved
_EXTENT = struct.Struct("=QQQQQLLLL")  # logical, physical, length, 2 reserved, flags, 3 reserved
_LAST = 0x1
_UNWRITTEN = 0x800
_BATCH = 1024


def local_path(pid: int | None, layer: Layer) -> str | None:
    """Return a path on this host to the layer's image file, or None.

    :param pid: the process at the other end of the monitor.
    """
    storage = layer.storage
    if pid is None or storage is None or storage.driver != "file":
        return None
    try:
        path = Path(storage.filename)
        if not path.is_absolute():
            path = Path(f"/proc/{pid}/cwd").readlink() / path
        wanted = path.stat()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                held = entry.stat()
            except OSError:
                continue  # closed since it was listed
            if (held.st_dev, held.st_ino) == (wanted.st_dev, wanted.st_ino):
                return str(path)
    except (OSError, ValueError):
        return None  # not here, or not ours to look at
    return None


def reserved_ranges(path: str, size: int) -> Ranges | None:
    """Return the ranges of a raw image that are fallocated but not written, in bytes.

    To QEMU they are holes; only FIEMAP tells (qemu-facts 11.1). Reads metadata only.

    :param size: of the disk; what the file holds past it does not count.
    :return: None where the file system cannot tell.
    """
    from qmpblock.ranges import Ranges

    found: list[tuple[int, int]] = []
    position = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        buffer = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
        while position < size:
            _HEADER.pack_into(buffer, 0, position, size - position, 0, 0, _BATCH, 0)
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
                if flags & _UNWRITTEN:
                    found.append((logical, min(position, size)))
            if count == 0 or flags & _LAST:
                break
    finally:
        os.close(fd)
    return Ranges(found)
