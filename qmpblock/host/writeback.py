"""What was written to a file, on its way from the page cache to storage, before anybody waits."""

from __future__ import annotations

import ctypes
import os

__all__ = ["begin_writeback"]

_WRITE = 0x2  # linux/fs.h, SYNC_FILE_RANGE_WRITE


def begin_writeback(fd: int) -> None:
    """Have what is written to a file by now begin to go to storage; wait for none of it.

    Nothing is on stable storage by it, as far as anybody knows: that is for who flushes the file,
    and so are errors, of which none is told here. It waits while the device's queue is full.

    :raise OSError: the kernel cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.sync_file_range
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call(fd, 0, 0, _WRITE) != 0:  # to its end, wherever that is
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
