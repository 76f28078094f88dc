"""Who makes a backup in a directory: one process at a time, by a lock on a file in it (flock).

Whoever only wants to know whether somebody does has the same lock for an instant, shared, and
nothing is written; so whoever wants to make one waits that long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qmpblock.errors import UNTOUCHED, BusyError, Error, printable
from qmpblock.host.ourfiles import Directory
from qmpblock.names import BACKUP_LOCK_FILE

__all__ = ["check_free", "locked", "maker", "unwritable"]

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOKS, _LOOK = 5, 0.01  # others who only look are waited for so often; seconds


@contextmanager
def locked(path: str, files: Directory) -> Iterator[None]:
    """Be the only one who makes a backup in a directory, while this lasts.

    :param path: of the directory, for people.
    :raise BusyError: somebody else does.
    :raise Error: there are no locks there.
    """
    while (fd := _locked_file(path, files)) is None:  # whoever had it has removed it
        pass
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def check_free(path: str, files: Directory) -> None:
    """Refuse what `locked` would refuse; nothing is made.

    :raise Error: as of `locked`.
    """
    try:
        fd = os.open(BACKUP_LOCK_FILE, _FLAGS, dir_fd=files.fd)
    except FileNotFoundError:
        if (why := unwritable(files)) is not None:
            raise _cannot_make(path, why) from None
        return
    except OSError as error:
        raise _cannot_make(path, error.strerror) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path, _who(fd)) from None
    except OSError as error:
        raise _no_locks(path, error.strerror) from None
    finally:
        os.close(fd)


def maker(files: Directory) -> str | None:
    """Return who makes a backup in a directory, in words that follow "by"; None: nobody is seen to.

    As far as can be told: on another host, or by whoever may not read there, perhaps not.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(BACKUP_LOCK_FILE, flags, dir_fd=files.fd)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _who(fd)
        return f"process {who}" if who else "somebody who has not said yet who he is"
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def unwritable(files: Directory) -> str | None:
    """Say why no file can be made in a directory; None where one can."""
    if os.access(".", os.W_OK | os.X_OK, dir_fd=files.fd, effective_ids=True):
        return None
    readonly = os.fstatvfs(files.fd).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if readonly else errno.EACCES)


def _locked_file(path: str, files: Directory) -> int | None:
    """Return the descriptor of the file that is locked; None where it is another one by now."""
    try:
        fd = os.open(BACKUP_LOCK_FILE, _FLAGS | os.O_CREAT, 0o644, dir_fd=files.fd)
    except OSError as error:
        raise _cannot_make(path, error.strerror) from None
    ours = False
    try:
        _lock(fd)
        there = files.status(BACKUP_LOCK_FILE)
        ours = there is not None and os.path.samestat(there, os.fstat(fd))
    except BlockingIOError:
        raise _busy(path, _who(fd)) from None
    except OSError as error:
        raise _no_locks(path, error.strerror) from None
    finally:
        if not ours:
            os.close(fd)
    return fd if ours else None


def _lock(fd: int) -> None:
    """Lock a file for oneself.

    :raise BlockingIOError: somebody has it, for longer than to look.
    :raise OSError: it cannot be locked.
    """
    for _ in range(_LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOOK)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _who(fd: int) -> str:
    """Return who says that he makes one; empty where nobody does by now."""
    return os.pread(fd, 100, 0).decode(errors="replace").strip()


def _cannot_make(path: str, why: object) -> Error:
    name = posixpath.join(path, BACKUP_LOCK_FILE)
    return Error(f"cannot make {printable(name)}: {why}", standing=UNTOUCHED)


def _busy(path: str, who: str) -> BusyError:
    return BusyError(
        f"a backup is being made in {printable(path)}"
        + (f", by process {printable(who)}" if who else ""),
        standing=UNTOUCHED,
        remedy="wait for it, or name another directory",
    )


def _no_locks(path: str, why: object) -> Error:
    return Error(
        f"{printable(path)} is on a file system that knows no locks: {why}",
        standing=UNTOUCHED,
        remedy="name a directory on another one",
    )
