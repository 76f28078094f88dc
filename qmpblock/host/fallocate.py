"""fallocate(2) that changes no size: blocks are given to a file, or taken from it."""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["UNSUPPORTED", "keep_size", "punch_hole"]

#: The errors of a file system that cannot.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

# linux/falloc.h
_KEEP_SIZE = 0x1
_PUNCH_HOLE = 0x2

_BLOCK = 1 << 16  # bytes; no file system of Linux has larger ones


def keep_size(fd: int, offset: int, length: int) -> None:
    """Give blocks to a range of a file, past its end too, and touch no byte; in bytes.

    :raise OSError: there is no room, or the file system cannot.
    """
    _fallocate(fd, _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Take the blocks of a range from a file; it reads as zeros then. In bytes.

    A range to the file's end takes its last block, too, wherever in that the file ends.

    :raise OSError: the file system cannot.
    """
    if offset + length >= os.fstat(fd).st_size:
        length += _BLOCK  # of a block of which it is but a part none is taken
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
