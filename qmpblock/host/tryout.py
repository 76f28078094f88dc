"""What the file system of a directory can do, tried on a file that nobody sees and goes at once."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from typing import IO

from qmpblock.host.fallocate import UNSUPPORTED, keep_size

__all__ = ["clones", "direct_unit", "reserves"]

_UNITS = (512, 4096, 65536)  # bytes; what devices and file systems want direct I/O aligned to
_BLOCK = 4096  # bytes
_FICLONE = 0x40049409  # linux/fs.h


def reserves(directory: int) -> bool:
    """Whether ranges of files there can be given blocks (fallocate).

    :param directory: its descriptor.
    :raise OSError: no file can be made there, or it has no room for a block.
    """
    with _file(directory) as file:
        try:
            keep_size(file.fileno(), 0, _BLOCK)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
    return True


def clones(directory: int) -> bool:
    """Whether files there can share blocks (FICLONE).

    :param directory: its descriptor.
    :raise OSError: no file can be made there, or it has no room for a block.
    """
    with _file(directory) as one, _file(directory) as other:
        os.pwrite(one.fileno(), bytes(_BLOCK), 0)
        try:
            fcntl.ioctl(other.fileno(), _FICLONE, one.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL, *UNSUPPORTED):
                raise
            return False
    return True


def direct_unit(directory: int) -> int | None:
    """Return to how many bytes writes past the page cache have to be aligned there; None: no such.

    :param directory: its descriptor.
    :raise OSError: no file can be made there, or it has no room for a block.
    """
    with _file(directory) as file, mmap.mmap(-1, _UNITS[-1]) as zeros:
        name = f"/proc/self/fd/{file.fileno()}"
        try:
            direct = os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        try:
            for unit in _UNITS:
                try:
                    os.pwrite(direct, memoryview(zeros)[:unit], 0)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    return unit
        finally:
            os.close(direct)
    return None


def _file(directory: int) -> IO[bytes]:
    """Return a file without a name; where there are none (NFS), its name is gone by now."""
    return tempfile.TemporaryFile(dir=f"/proc/self/fd/{directory}", buffering=0)
