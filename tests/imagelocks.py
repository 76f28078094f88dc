"""A lock on a byte of a file, as QEMU puts them on its images."""

import fcntl
import struct
from typing import IO, Any

F_OFD_SETLK = 37


def lock(file: IO[Any], byte: int) -> None:
    """Put a shared lock on one byte, as QEMU does."""
    fcntl.fcntl(file.fileno(), F_OFD_SETLK, struct.pack("hhqqixxxx", fcntl.F_RDLCK, 0, byte, 1, 0))
