"""Links on the way to something: root goes by no other user's to what that one could not reach.

Whoever may write to a directory can put a link there, in the place of his image or of his QEMU's
monitor; root, who is given that name, would be led to a file, a directory or a socket of the
other's choosing. So each step of the way is looked at, and held by its descriptor.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import NoReturn

__all__ = ["walk"]

_LOOK = os.O_PATH | os.O_CLOEXEC
_MOST = 40  # on one way, as path_resolution(7)


def walk(path: Path, wanted: int, *, search: bool = False) -> int:
    """Open what a path leads to, for looking at it alone (O_PATH).

    :param wanted: what the owners of the links on the way must be allowed there: W_OK or R_OK.
    :param search: whether they must be allowed to come there, too.
    :raise OSError: it is not there, or one of them is not.
    """
    todo = list(reversed((path if path.is_absolute() else Path.cwd() / path).parts))
    links: dict[int, str] = {}  # by their owners
    passed = 0
    at = os.open(todo.pop(), _LOOK | os.O_DIRECTORY)
    try:
        while todo:
            name = todo.pop()
            if search:
                _check_links(at, path, links, os.X_OK)
            next_fd, owner, target = _step(at, name)
            if target is not None:
                passed += 1
                if passed > _MOST:
                    _fail(errno.ELOOP, path)
                links[owner] = name
                todo += reversed(target.parts)
                if not target.is_absolute():
                    continue
                next_fd = os.open(todo.pop(), _LOOK | os.O_DIRECTORY)
            os.close(at)
            at = next_fd
        _check_links(at, path, links, wanted)
    except BaseException:
        os.close(at)
        raise
    return at


def _step(at: int, name: str) -> tuple[int, int, Path | None]:
    """Open what bears a name; of a link return its owner and its target instead."""
    fd = os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=at)
    status = os.fstat(fd)
    if not stat.S_ISLNK(status.st_mode):
        return fd, status.st_uid, None
    try:
        if status.st_dev == Path("/proc").stat().st_dev:  # /proc/PID/root: no text says whereto
            return os.open(name, _LOOK, dir_fd=at), status.st_uid, None
        return -1, status.st_uid, Path(os.readlink("", dir_fd=fd))
    finally:
        os.close(fd)


def _check_links(fd: int, path: Path, links: dict[int, str], wanted: int) -> None:
    """See that no link of another's has led us to where he could not come himself."""
    status = os.fstat(fd)
    for owner, name in links.items():
        if owner not in (0, status.st_uid) and not _may(owner, status, wanted):
            may_not = {os.R_OK: "read it", os.W_OK: "write there", os.X_OK: "go there"}[wanted]
            _fail(
                errno.EACCES,
                path,
                f"the way there leads through the link {name} of user {owner}, who may not "
                f"{may_not}",
            )


def _may(user: int, status: os.stat_result, wanted: int) -> bool:
    """Whether the mode of a file allows something to who is not its owner."""
    try:
        known = pwd.getpwuid(user)
        groups = os.getgrouplist(known.pw_name, known.pw_gid)
    except KeyError:
        groups = []
    shift = 3 if status.st_gid in groups else 0
    return bool(status.st_mode >> shift & wanted)


def _fail(number: int, path: Path, why: str = "") -> NoReturn:
    raise OSError(number, why or os.strerror(number), str(path))
