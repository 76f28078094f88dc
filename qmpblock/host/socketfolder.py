"""The directory for the socket of an NBD server of ours: nobody else can put another in its place.

It lies in the temporary directory, which others can write to, and which whoever started us has
chosen. A socket is bound by its path, and the kernel shows that, by which it is found again. So as
root it is made only where all above it is root's, and what others can write to is sticky: there
they can make files, but rename or remove none of ours. Where TMPDIR is not so, it lies in /tmp.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qmpblock.address import UnixAddress
from qmpblock.host.ourfiles import Directory
from qmpblock.host.statedirectory import InsecureError, open_proven
from qmpblock.names import SOCKET

__all__ = ["SocketFolder", "remove_socket", "temporary_directory"]

_LONGEST = 100  # bytes of its path: a socket's has room for 107 (unix(7))
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class SocketFolder:
    """A directory that is named, then made, then removed.

    :ivar path: its own; `socket`: the path of the socket in it.
    """

    def __init__(self, name: str, places: Sequence[str] = ()) -> None:
        """Name it.

        :param places: where it may be, the best first; empty: the usual ones.
        """
        self.path = Path(temporary_directory(name, places), name)
        self.socket = str(self.path / SOCKET)
        self._fd = -1
        self._there = False

    def make(self) -> None:
        """Make it, for this user alone.

        :raise OSError: it cannot be made; or others could put another one in its place.
        """
        above = _open(self.path.parent)
        try:
            os.mkdir(self.path.name, 0o700, dir_fd=above)
            self._there = True
            self._fd = os.open(self.path.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        finally:
            os.close(above)
        if os.fstat(self._fd).st_uid != os.geteuid():
            raise PermissionError(errno.EACCES, "somebody has put another directory in its place")

    def address(self) -> UnixAddress:
        """Return the way to the socket in the directory that was made, whatever bears its name."""
        return UnixAddress(f"/proc/self/fd/{self._fd}/{SOCKET}")

    def leave(self) -> None:
        """Let go of it: it stays, so that nobody else can have its name. Idempotent."""
        self._there = False
        self.remove()

    def remove(self) -> None:
        """Remove it, and the socket. Idempotent."""
        if self._there:
            self._there = False
            remove_socket(self.socket)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def temporary_directory(name: str, places: Sequence[str] = ()) -> str:
    """Choose where a directory of ours can lie that nobody else can put another in the place of.

    :param name: what it will be called, where a socket's path has room.
    :param places: where it may be, the best first; empty: the usual ones.
    :return: the last of them, where none is so.
    """
    places = places or (tempfile.gettempdir(), "/tmp")  # noqa: S108  # it is for us alone
    short = [one for one in places if len(os.fsencode(Path(one, name))) < _LONGEST]
    return next(filter(_is_safe, short), places[-1])


def remove_socket(path: str) -> None:
    """Remove a socket of ours and its directory, and never anything else that is in it.

    The directory may be one that QEMU's user has named: it is no link, and nobody but its owner may
    write to it. So it is ours, or his own, where he could do this himself.
    """
    folder, name = posixpath.split(path)
    above, last = posixpath.split(folder)
    with contextlib.suppress(OSError, ValueError), Directory(above) as directory:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(last, flags, dir_fd=directory.fd)
        try:
            if os.fstat(fd).st_mode & 0o022:
                return
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISSOCK(status.st_mode):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(last, dir_fd=directory.fd)


def _open(place: Path) -> int:
    return open_proven(place, shared=True) if os.geteuid() == 0 else os.open(place, _DIRECTORY)


def _is_safe(place: str) -> bool:
    try:
        os.close(_open(Path(place)))
    except InsecureError:
        return False
    except OSError:
        pass  # it is not there, say: that is told when it is to be used
    return True
