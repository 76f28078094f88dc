"""fallocate(2) that changes no size: blocks are given to a file, and no byte of it is touched."""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["UNSUPPORTED", "keep_size"]

#: The errors of a file system that cannot.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

_KEEP_SIZE = 0x1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h


def keep_size(fd: int, offset: int, length: int) -> None:
    """Give blocks to a range of a file, past its end too; in bytes.

    :raise OSError: there is no room, or the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(fd, _KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
