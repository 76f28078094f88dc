"""The state directory: the one place where nobody but us can write, so that what lies there counts.

It is opened once, from the root of the file system down, each directory on the way proven by its
descriptor: it belongs to root or to us, and nobody else may put another one in the place of the
next. What lies in it is then named by its descriptor alone.

It also holds the key of this installation, by which a journal that lies anywhere else proves to be
ours (`qmpblock.changes.linechain`). To have another installation's journals proven here, put its
key there, as `NAME.key`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import re
import secrets
import stat
from pathlib import Path

from qmpblock.errors import printable
from qmpblock.host.ourfiles import Directory

__all__ = [
    "InsecureError",
    "OpenDirectory",
    "StateDirectory",
    "open_proven",
    "state_directory",
]

KEY = "key"
_KEY_SIZE = 32  # bytes
_TRIAL = re.compile(rf"{KEY}-[0-9a-f]{{16}}")
_LINKS = 40  # that are followed on the way, as the kernel does
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class InsecureError(OSError):
    """Others than root and this user can change what lies there. Says who, and where."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(errno.EPERM, f"{printable(path)} {why}", str(path))


def state_directory() -> Path:
    """Return where journals are kept (design.md, safety rule 9); it need not exist."""
    if named := os.environ.get("QMPBLOCK_STATE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/qmpblock")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "qmpblock"


class OpenDirectory(Directory):
    """A directory that is open for as long as there is a journal in it: closed with this object."""

    @classmethod
    def at(cls, path: Path) -> OpenDirectory:
        """Open a directory by its path.

        :raise OSError: it cannot be opened; it is none.
        """
        try:
            return cls(path)
        except ValueError:  # a name that no file can have
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()

    def names(self) -> list[str]:
        """Return the names of what lies there, sorted.

        :raise OSError: it cannot be listed.
        """
        fd = os.open(".", _LIST, dir_fd=self.fd)
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208  it has no path
        finally:
            os.close(fd)


class StateDirectory(OpenDirectory):
    """The state directory, open and proven."""

    @classmethod
    def proven(cls, *, make: bool = False) -> StateDirectory | None:
        """Open it, and see that it and all above it is root's or ours.

        :param make: make it, and what is missing above it, for this user alone (0700).
        :return: None if it is not there.
        :raise InsecureError: others could change what lies there.
        :raise OSError: it cannot be opened, or made.
        """
        path = state_directory()
        try:
            fd = open_proven(path, make=make)
        except OSError as error:
            if not make and isinstance(error, FileNotFoundError | NotADirectoryError):
                return None
            if not Path(str(error.filename)).is_absolute():  # it is opened part by part
                error.filename = str(path)
            raise
        return cls(path, fd)

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def key(self) -> bytes:
        """Return the key of this installation, which is made at its first use.

        :raise OSError: it cannot be read, or made; there is no room, say.
        """
        self._sweep_trials()
        while True:
            with contextlib.suppress(FileNotFoundError):
                return self._read_key(KEY)
            self._make_key()

    def _make_key(self) -> None:
        # Made whole before it has its name: of two that make one, the first one's counts.
        trial = f"{KEY}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(trial, flags, 0o600, dir_fd=self.fd)
        try:
            # Held until it has no name any more, so that nobody takes it for one of the dead's.
            with contextlib.suppress(OSError):  # where there are no locks, nobody sweeps either
                fcntl.flock(fd, fcntl.LOCK_EX)
            os.fchmod(fd, 0o600)
            os.write(fd, secrets.token_bytes(_KEY_SIZE))
            os.fsync(fd)
            # Not there: it was swept before it was held. Then once more.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(trial, KEY, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(trial, dir_fd=self.fd)
            os.close(fd)
        self.sync()

    def _sweep_trials(self) -> None:
        """Remove what was to become the key, and whose maker died: nobody holds it."""
        for name in filter(_TRIAL.fullmatch, self.names()):
            with contextlib.suppress(OSError):  # of no harm where it stays
                fd = os.open(name, _HOLD, dir_fd=self.fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if stat.S_ISREG(os.fstat(fd).st_mode):
                        os.unlink(name, dir_fd=self.fd)
                finally:
                    os.close(fd)

    def keys(self) -> list[bytes]:
        """Return every key that proves a journal here: our own, and those that were brought."""
        keys = []
        for name in self.names():
            if name == KEY or name.endswith(f".{KEY}"):
                with contextlib.suppress(OSError):  # it proves nothing then
                    keys.append(self._read_key(name))
        return keys

    def _read_key(self, name: str) -> bytes:
        path = self.path / name
        looked = os.open(name, _LOOK, dir_fd=self.fd)
        try:
            status = os.fstat(looked)
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
                raise InsecureError(path, "is no file of this user or root")
            if status.st_mode & 0o077:
                raise InsecureError(path, "is no secret: others may read it")
            fd = os.open(f"/proc/self/fd/{looked}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(looked)
        try:
            key = os.read(fd, _KEY_SIZE + 1)
        finally:
            os.close(fd)
        if len(key) != _KEY_SIZE:
            raise OSError(errno.EINVAL, f"is no key of {_KEY_SIZE} bytes", str(path))
        return key


def open_proven(path: Path, *, make: bool = False, shared: bool = False) -> int:
    """Open a directory, one step after another; each is proven before the next is taken.

    All are root's or ours, and nobody else can put another one in the place of the next.

    :param make: make it, and what is missing above it, for this user alone (0700).
    :param shared: whether others may make files in it, as in /tmp; to rename or remove ours they
        may not.
    :return: its descriptor (O_PATH).
    :raise InsecureError: it is not so.
    :raise OSError: it cannot be opened, or made.
    """
    waiting = list(path.absolute().parts)
    fd, links = -1, 0
    try:
        while waiting:
            name = waiting.pop(0)
            next_fd = _step(fd, name, make=make)
            status = os.fstat(next_fd)
            if status.st_uid not in (0, os.geteuid()):
                os.close(next_fd)
                raise InsecureError(name, f"on the way to it belongs to the user {status.st_uid}")
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink("", dir_fd=next_fd)
                os.close(next_fd)
                links += 1
                if links > _LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                waiting[:0] = Path(target).parts
                continue
            if fd >= 0:
                os.close(fd)
            fd = next_fd
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            # In a sticky directory nobody can put another one in our place.
            guarded = bool(waiting or shared) and bool(status.st_mode & stat.S_ISVTX)
            if not guarded and _others_write(status):
                where = Path(f"/proc/self/fd/{fd}").readlink()
                raise InsecureError(where, f"is writable for others: chmod go-w {where}")
        proven, fd = fd, -1
        return proven
    finally:
        if fd >= 0:
            os.close(fd)


def _step(fd: int, name: str, *, make: bool) -> int:
    """Open what a directory has under a name, for looking at it; make it if it is missing."""
    if name == "/":
        return os.open("/", _LOOK)
    try:
        return os.open(name, _LOOK, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=fd)
        os.chmod(name, 0o700, dir_fd=fd)  # the umask may have taken from us, too
    return os.open(name, _LOOK, dir_fd=fd)


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_group_of_our_own(status.st_gid)


def _is_group_of_our_own(gid: int) -> bool:
    """Whether it is a group that has this user's name and nobody else in it (umask 002)."""
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}
