"""One file of a journal, by its descriptor: made once, kept open, never reopened by its name.

Others may write to the directory in which it lies, beside an image: what they put in its place is
not written to, not truncated and not removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from itertools import takewhile

from qmpblock.changes.linechain import lines_of
from qmpblock.errors import UNTOUCHED, RecordError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.fallocate import UNSUPPORTED, keep_size
from qmpblock.host.statedirectory import OpenDirectory

__all__ = ["FULL", "LIMIT", "DistrustedError", "JournalFile"]

#: The errors of a file system that has no room.
FULL = (errno.ENOSPC, errno.EDQUOT)
#: Bytes of a journal that are read; one of ours has some kilobytes.
LIMIT = 16 << 20
_SPARE = 4096  # bytes that the entries of one slice, or the marks of a pivot, will need


class DistrustedError(Exception):
    """Others could have written it, and files are removed by what it says. Says why."""


class JournalFile:
    """A file that lies in a directory, both open until it is removed, or nobody has this object.

    :ivar path: for people.
    :ivar writable: whether this user may write to it.
    """

    def __init__(self, directory: OpenDirectory, name: str, fd: int, *, writable: bool = True):
        self._directory: OpenDirectory | None = directory  # None: it was removed
        self._name = name
        self._fd = fd
        self.path = directory.path / name
        self.writable = writable

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        """Let go of both: what a journal lay on may be unmounted, whoever still has this object."""
        self._directory, fd, self._fd = None, self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    @classmethod
    def create(cls, directory: OpenDirectory, name: str, text: bytes) -> JournalFile | None:
        """Make it, with its first line, room for what follows, and all on stable storage.

        :return: None if there is no room for it; nothing is left of it.
        :raise OSError: it cannot be made; something has its name, say.
        """
        # Exclusive: others may have put a link there, or a file that is not ours to change.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = cls(directory, name, os.open(name, flags, 0o600, dir_fd=directory.fd))
        except OSError as error:
            error.filename = directory.path / name
            if error.errno in FULL:
                return None
            raise
        try:
            os.fchmod(file._fd, 0o600)  # the umask may have taken from us, too
            file._reserve(len(text))
            file._write(0, text)
            directory.sync()
        except OSError as error:
            error.filename = file.path
            file.remove()
            if error.errno in FULL:
                return None
            raise
        return file

    @classmethod
    def open(cls, directory: OpenDirectory, name: str) -> JournalFile | None:
        """Open one that is there; None if it is not.

        :raise DistrustedError: others than this user and root could have written it.
        :raise RecordError: it cannot be opened.
        """
        path = directory.path / name
        try:
            # For looking at it alone: to open a FIFO would wait, a device may do anything.
            looked = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
            try:
                _check(os.fstat(looked))
                again = f"/proc/self/fd/{looked}"
                try:
                    return cls(directory, name, os.open(again, os.O_RDWR | os.O_CLOEXEC))
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                fd = os.open(again, os.O_RDONLY | os.O_CLOEXEC)
                return cls(directory, name, fd, writable=False)
            finally:
                os.close(looked)
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise RecordError(
                f"the journal {printable(path)} cannot be read: {error.strerror}",
                standing=UNTOUCHED,
                remedy="run this as root, or as the user who ran that qmpblock",
                path=path,
            ) from None

    def read(self) -> bytes:
        """Return what it holds, up to a limit and one byte.

        :raise OSError: it cannot be read; it was removed.
        """
        self._check_there()
        content, position = b"", 0
        while chunk := os.pread(self._fd, LIMIT + 1 - position, position):
            content += chunk
            position += len(chunk)
        return content

    def _check_there(self) -> None:
        if self._directory is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)

    def become(self, lines: bytes) -> None:
        """Have it hold these whole lines, on stable storage. Only what differs is written.

        Where that fails it holds what it did: half a line, or one that was not acted upon, would
        be believed.

        :raise OSError: it cannot be written, or is not there any more.
        """
        if not self.writable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)
        self._check_there()
        if not os.fstat(self._fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        held = self.read()
        whole = lines_of(held)
        same = len(_common_lines(whole, lines))
        try:
            if same < len(held):  # a dead controller's last line, torn, say
                os.ftruncate(self._fd, same)
                with contextlib.suppress(OSError):
                    self._reserve(len(lines))
            self._write(same, lines[same:])
        except OSError as error:
            error.filename = self.path
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, same)
                self._write(same, whole[same:])
            raise

    def remove(self) -> None:
        """Remove it, if its name still leads to it, and close it. Idempotent.

        :raise OSError: it cannot be removed.
        """
        if self._directory is None:
            return
        mine = FileId.of(os.fstat(self._fd))
        assert mine is not None  # it is a plain file
        if self._directory.remove(self._name, mine):
            self._directory.sync()
        self._close()

    def _reserve(self, size: int) -> None:
        """Give a journal of `size` bytes room for what it will need besides."""
        try:
            keep_size(self._fd, 0, size + _SPARE)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def _write(self, position: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self._fd, data, position)
            position, data = position + written, data[written:]
        os.fsync(self._fd)


def _common_lines(one: bytes, other: bytes) -> bytes:
    """Return the lines that both begin with."""
    if other.startswith(one):
        return one
    if one.startswith(other):
        return other
    pairs = zip(one.splitlines(keepends=True), other.splitlines(keepends=True), strict=False)
    return b"".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DistrustedError("it is no plain file")
    if status.st_uid not in (0, os.geteuid()):
        raise DistrustedError(f"it belongs to the user {status.st_uid}")
    if status.st_mode & 0o022:
        raise DistrustedError("others may write to it")
