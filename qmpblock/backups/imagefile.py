"""One image file of a backup: its digest, and whether it is what its backup says."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from qmpblock.errors import Error, printable

if TYPE_CHECKING:
    from qmpblock.backups.directory import Backups
    from qmpblock.backups.point import Image

__all__ = ["Proven", "digest_of", "first_broken", "why_changed", "why_open_wrong", "why_wrong"]

_PIECE = 8 << 20  # bytes that are read, and digested, between two looks
_LENGTH = 32  # bytes of a digest


async def digest_of(fd: int, tell: Callable[[int], None] | None = None) -> str:
    """Return the digest of a file, from its beginning to its end: blake2b of 256 bits.

    It is read in a thread, piece by piece. Cancelling stops at once; the piece that is being read
    is read to its end, by a descriptor of its own.

    :param tell: is told how many bytes more are done.
    :raise OSError: it cannot be read.
    """
    digest, at, own = hashlib.blake2b(digest_size=_LENGTH), 0, os.dup(fd)
    thread = ThreadPoolExecutor(1)

    def take() -> int:
        data = os.pread(own, _PIECE, at)
        digest.update(data)
        return len(data)

    try:
        os.posix_fadvise(own, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while done := await asyncio.wrap_future(thread.submit(take)):
            at += done
            if tell is not None:
                tell(done)
    finally:
        thread.submit(os.close, own)  # after what it is still about
        thread.shutdown(wait=False)
    return digest.hexdigest()


def why_changed(backups: Backups, image: Image) -> str | None:
    """Say why a file is not what its backup says, by what is seen at once; None where it may be.

    Empty where only its digest can tell: it has its length, but was written to since.
    """
    try:
        status = backups.status(image.file)
    except OSError as error:
        return f"{image.file} cannot be read: {error.strerror}"
    if status is None:
        return f"{image.file} is gone"
    if status.st_size != image.backup.length:
        return f"{image.file} has {status.st_size} bytes, and had {image.backup.length}"
    return None if status.st_mtime_ns == image.backup.modified else ""


async def why_wrong(
    backups: Backups, image: Image, tell: Callable[[int], None] | None = None
) -> str | None:
    """Say why a file is not what its backup says, by all of it; None where it is."""
    if why := why_changed(backups, image):
        return why
    try:
        fd = backups.open(image.file)
    except OSError as error:
        return f"{image.file} cannot be read: {printable(error.strerror)}"
    try:
        return await why_open_wrong(fd, image, tell)
    finally:
        os.close(fd)


async def why_open_wrong(
    fd: int, image: Image, tell: Callable[[int], None] | None = None
) -> str | None:
    """Say why an open file is not what a backup says of its image, by all of it; None: it is."""
    try:
        found = await digest_of(fd, tell)
    except OSError as error:
        return f"{image.file} cannot be read: {printable(error.strerror)}"
    return (
        None if found == image.backup.digest else f"{image.file} holds something else than it did"
    )


class Proven:
    """The images of a directory that are known to be what their backups say: by file, not by name.

    No descriptor is kept meanwhile, for there may be thousands. A file that is opened again is the
    proven one where nothing of its status has changed: whatever is written to it, or done to it,
    changes a time that nobody can set back. Where something has, it is read again.

    :param tell: is told how many bytes more were read.
    """

    def __init__(self, backups: Backups, tell: Callable[[int], None] | None = None) -> None:
        self._backups = backups
        self._tell = tell
        self._seen: dict[str, tuple[int, ...]] = {}

    async def open(self, image: Image) -> int:
        """Open an image, see that it is what its backup says, and return its descriptor.

        :raise Error: it is not; the message is why.
        """
        why = None if image.file in self._seen else why_changed(self._backups, image)
        if why:
            raise Error(why)
        try:
            fd = self._backups.open(image.file)
        except OSError as error:
            raise Error(f"{image.file} cannot be read: {printable(error.strerror)}") from None
        try:
            await self.check(image, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def check(self, image: Image, fd: int) -> None:
        """See that a file of it that is open is what its backup says, at this moment.

        :raise Error: it is not; the message is why.
        """
        state = _state(os.fstat(fd))  # before it is read
        if self._seen.get(image.file) == state:
            return
        why = await why_open_wrong(fd, image, None if self._seen.get(image.file) else self._tell)
        if why is not None:
            raise Error(why)
        self._seen[image.file] = state


def _state(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


async def first_broken(backups: Backups, chain: tuple[Image, ...]) -> str | None:
    """Say what of an image, and of those that it lies on, is not what it was; None: nothing.

    A file that has its length, and the time at which it was written to last, is taken for what it
    was; of any other the digest is taken.
    """
    for image in chain:
        why = why_changed(backups, image)
        if why == "":
            why = await why_wrong(backups, image)
        if why is not None:
            return why
    return None
