"""One image file of a backup: its digest, and whether it is what its backup says."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.backups.directory import Backups
    from qmpblock.backups.point import Image

__all__ = ["digest_of", "first_broken", "why_changed", "why_wrong"]

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
        try:
            found = await digest_of(fd, tell)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{image.file} cannot be read: {printable(error.strerror)}"
    return (
        None if found == image.backup.digest else f"{image.file} holds something else than it did"
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
