"""The bytes of an image file that is yet to be, apart from its holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Contents"]


_ZEROS = 1 << 20  # bytes, written at once


@dataclass(frozen=True)
class Contents:
    """The bytes of an image file that is yet to be.

    :ivar length: of the file, in bytes.
    :ivar pieces: what is data in it, by its offset; the rest is a hole.
    """

    length: int
    pieces: tuple[tuple[int, bytes], ...] = field(repr=False)

    @classmethod
    def of(cls, fd: int) -> Contents:
        """Read a sparse file."""
        length, at = os.fstat(fd).st_size, 0
        pieces: list[tuple[int, bytes]] = []
        while at < length:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # no data after `at`
            at = os.lseek(fd, start, os.SEEK_HOLE)
            pieces.append((start, os.pread(fd, at - start, start)))
        return cls(length, tuple(pieces))

    def write_to(self, fd: int) -> None:
        """Make an empty file hold them.

        :raise OSError: it cannot.
        """
        os.ftruncate(fd, self.length)
        for at, data in self.pieces:
            _write(fd, data, at)

    def write_over(self, fd: int) -> None:
        """Make the beginning of what is no empty file hold them, holes as zeros.

        :raise OSError: it cannot.
        """
        for at, data in self.whole():
            _write(fd, data, at)

    def whole(self) -> Iterator[tuple[int, bytes]]:
        """Yield all of it from the first byte to the last, holes as zeros: each with its offset."""
        end = 0
        for at, data in (*self.pieces, (self.length, b"")):
            for hole in range(end, at, _ZEROS):
                yield hole, bytes(min(_ZEROS, at - hole))
            if data:
                yield at, data
            end = at + len(data)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
