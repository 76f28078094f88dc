"""Directories for one test's VMs: private, short enough for sockets, and gone when their owner is.

Whoever makes one holds a lock (flock) on a file in it, `.owner`, for as long as it lives. A pid
would be given to another process one day; a lock ends with its holder, however that ends: by
`kill -9`, by SIGTERM, by the `os._exit` of a test's time limit. So the next run can tell what
nobody owns any more, and sweeps it: a directory of this user's with such a file that nobody has
locked. All else in the temporary directory is none of ours, whatever it is called.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qmpblock.errors import RequestError

__all__ = [
    "PATH_LIMIT",
    "failed",
    "keep",
    "leave",
    "private_directory",
    "remove",
    "settle",
    "sweep",
    "wait_for_verdict",
]

PATH_LIMIT = 107
"""Bytes of a UNIX socket's path (unix(7))."""

_PREFIX = "qt-"
_OWNER = ".owner"
_ROOM = 32  # bytes that are left below a directory for a socket's path
_SMALL = ("tmpfs", "qmpblock")  # type and source of what faults.small_file_system mounts

_log = logging.getLogger(__name__)
_process = os.getpid()  # a fork has the list below, too, and owns nothing
_owned: dict[Path, int] = {}  # with the descriptor that holds the lock
_behind: dict[Path, tuple[Path, int]] = {}  # what a short name stands for, and its descriptor
_swept: set[Path] = set()

_failures = 0
_made_at: dict[Path, int] = {}  # how many failures there had been then
_waiting: list[Path] | None = None  # those that are left, until it is known whether all went well


@atexit.register
def _remove_rest() -> None:
    if os.getpid() == _process:
        for directory in list(_owned):
            remove(directory)


def private_directory() -> Path:
    """Make a directory (0700) whose path is short enough for UNIX sockets in it.

    It is this process's until `remove` or `keep`. The first call in a process sweeps.

    Where the temporary directory's name is too long for that, it is made in /tmp; where nothing
    can be made there, in the temporary directory all the same, under a short name that holds for
    other processes, too, as long as this one lives: `/proc/PID/fd/N`.

    :raise RequestError: there is no place for one.
    """
    wanted = Path(tempfile.gettempdir())
    long = len(os.fsencode(wanted)) + 1 + len(_PREFIX) + 8 > PATH_LIMIT - _ROOM
    try:
        return _make(Path("/tmp") if long else wanted)  # noqa: S108 - by mkdtemp, swept by owner
    except OSError as error:
        if not long:
            raise RequestError(
                f"cannot make a directory in {wanted}: {error.strerror}",
                remedy="name a directory that can be written in TMPDIR",
            ) from error
        refused = error
    try:
        return _short(_make(wanted))
    except OSError as error:
        raise RequestError(
            f"{wanted} is too long for a UNIX socket in it, and neither there ({error.strerror}) "
            f"nor in /tmp ({refused.strerror}) a directory can be made",
            remedy="name a directory that can be written in TMPDIR, of at most "
            f"{PATH_LIMIT - _ROOM - len(_PREFIX) - 9} bytes",
        ) from error


def _make(base: Path) -> Path:
    if base not in _swept:
        _swept.add(base)
        sweep(base)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    _own(directory)
    _made_at[directory] = _failures
    return directory


def _short(directory: Path) -> Path:
    """Return a short name of a directory: by a descriptor of this process."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    name = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    _behind[name] = directory, descriptor
    return name


def wait_for_verdict() -> None:
    """From now on, `leave` leaves the decision to `settle`: what was there at a failure stays."""
    global _waiting
    _waiting = _waiting or []


def failed() -> None:
    """Say that something has failed: what there is now is worth keeping."""
    global _failures
    _failures += 1


def leave(directory: Path) -> None:
    """Be done with a directory of `private_directory`: remove it, or have it wait. Idempotent."""
    directory = _let_short_go(directory)
    if _waiting is None:
        remove(directory)
    elif directory not in _waiting:
        _waiting.append(directory)


def settle() -> list[Path]:
    """Keep those that were left and there at a failure, remove the others; return the kept."""
    kept = []
    while _waiting:
        directory = _waiting.pop()
        if directory.exists() and _failures > _made_at.get(directory, 0):
            keep(directory)
            kept.append(directory)
        else:
            remove(directory)
    return kept


def _own(directory: Path) -> None:
    # It gets its name when it is locked: before that, nobody takes the directory for one of ours.
    path = directory / f"{_OWNER}.new"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks: it is never swept
        _log.debug("%s cannot be locked: %s", path, error)
        os.close(descriptor)
        path.unlink()
        return
    os.write(descriptor, f"qmpblock.testing, process {_process}; locked while it lives\n".encode())
    path.rename(directory / _OWNER)
    _owned[directory] = descriptor


def keep(directory: Path) -> None:
    """Give up a directory of `private_directory` that stays: no run sweeps it."""
    directory = _let_short_go(directory)
    (directory / _OWNER).unlink(missing_ok=True)
    _let_go(directory)


def remove(directory: Path) -> None:
    """Remove a directory of `private_directory` with all that is in it. Idempotent.

    What cannot be removed stays, is told in the log, and is tried again by the next run.
    """
    directory = _let_short_go(directory)
    try:
        if _empty(directory):
            # Its mark goes last: without it, no run would ever sweep the half that is left.
            (directory / _OWNER).unlink(missing_ok=True)
            directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s stays: %s", directory, error)
    _let_go(directory)


def _let_short_go(directory: Path) -> Path:
    """Give a short name up; return the directory's own."""
    real, descriptor = _behind.pop(directory, (directory, -1))
    if descriptor >= 0:
        os.close(descriptor)
    return real


def _let_go(directory: Path) -> None:
    _made_at.pop(directory, None)
    descriptor = _owned.pop(directory, None)
    if descriptor is not None:
        os.close(descriptor)


def sweep(base: Path) -> list[Path]:
    """Remove the directories in `base` whose owner has ended; return them.

    Several processes may do so at once.
    """
    removed = []
    try:
        found = [path for path in base.resolve().iterdir() if path.name.startswith(_PREFIX)]
    except OSError as error:
        _log.debug("%s cannot be listed: %s", base, error)
        return []
    for directory in found:
        with contextlib.suppress(OSError), _abandoned(directory) as mine:
            if mine:
                remove(directory)
                if not directory.exists():
                    removed.append(directory)
    if removed:
        _log.info("removed what runs that were killed left: %s", ", ".join(map(str, removed)))
    return removed


@contextlib.contextmanager
def _abandoned(directory: Path) -> Iterator[bool]:
    """Lock a directory of ours that nobody owns; give whether it is such.

    :raise OSError: it is not, or it cannot be looked at.
    """
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(place).st_uid != os.geteuid():
            yield False
            return
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK  # whatever it is, opening does not wait
        owner = os.open(_OWNER, flags, dir_fd=place)
        try:
            status = os.fstat(owner)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                yield False
                return
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have swept it between the two calls.
            yield os.fstat(owner).st_nlink == 1 and directory.samefile(f"/proc/self/fd/{place}")
        finally:
            os.close(owner)
    finally:
        os.close(place)


def _empty(directory: Path) -> bool:
    """Remove all but the mark; return whether nothing else is left."""
    if not _unmounted(directory):
        return False
    directory.chmod(0o700)
    for path in directory.iterdir():
        if path.name == _OWNER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_again)
        else:
            path.unlink(missing_ok=True)
    return {path.name for path in directory.iterdir()} <= {_OWNER}


def _again(function: object, path: str, error: object) -> None:
    """Open a directory that a test has closed to itself, and remove it after all."""
    parent = Path(path).parent
    try:
        for closed in (parent, Path(path)):
            if closed.is_dir() and not closed.is_symlink():
                closed.chmod(0o700)
        if Path(path).is_dir() and not Path(path).is_symlink():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)
    except OSError as why:
        _log.warning("%s stays: %s", path, why)


def _unmounted(directory: Path) -> bool:
    """Take small file systems of ours away; return whether nothing is mounted below any more.

    What somebody else mounted there is not ours to remove, nor to empty.
    """
    below = f"{directory.resolve()}/"
    free = True
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        if not point.startswith(below):
            continue
        if tuple(after.split()[:2]) == _SMALL:
            command = ["umount", "--lazy", point]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                continue
        _log.warning("%s stays: something is mounted at %s", directory, point)
        free = False
    return free
