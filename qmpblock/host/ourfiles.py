"""Files of ours in directories that others may write to: by descriptor, never twice by name.

Whoever may write to a directory can at any moment put a link, a FIFO or another file in the place
of a name in it, and a directory with a link in the place of the directory. So a directory is opened
once, and a file in it is told by what was made, not by what it is called::

    made      without a name (O_TMPFILE), owner and mode set, filled, recorded; then linked
    opened    again by no link, without waiting for a FIFO's other end; then it must be that file
    removed   only if that name still is that file

A link of another user's on the way to a directory may lead only where he could write himself: or he
would have root make files, which he then owns, anywhere. On the way to a file that is read, only to
what he could read (`qmpblock.links`).

Between that last look and unlinkat(2) another file may come to bear the name. It goes then: one
that its owner moved there, out of a directory in which he could have removed it himself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from qmpblock.graph.places import FileId
from qmpblock.links import walk

__all__ = [
    "Directory",
    "check_kind",
    "keep",
    "look",
    "open_plain",
    "remove",
    "rename",
    "write_file",
]

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems


class Directory:
    """A directory that was opened once, and files of ours in it. A context manager.

    All names are those of entries in it: one with a slash is a ValueError.

    :ivar path: by which it was opened, for people.
    :ivar fd: its descriptor (O_PATH).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it.

        :raise OSError: it is not there, or is no directory; or (as root) the way leads through a
            link of another user, who may not write there.
        """
        self.path = Path(path)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        if os.geteuid() != 0:
            self.fd = os.open(path, flags)
            return
        self.fd = walk(self.path, os.W_OK)
        if not stat.S_ISDIR(os.fstat(self.fd).st_mode):
            self.close()
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def status(self, name: str) -> os.stat_result | None:
        """Look at what bears a name, a link as a link; None where nothing does.

        :raise OSError: it cannot be looked at.
        """
        try:
            return os.stat(_entry(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def holds(self, name: str, file: FileId) -> bool:
        """Whether that name is that file, and no link to it."""
        with contextlib.suppress(OSError):
            status = self.status(name)
            return status is not None and FileId.of(status) == file
        return False

    def open(self, name: str, file: FileId, flags: int = os.O_RDONLY) -> int:
        """Open a file again, and return its descriptor.

        :param file: that it must be.
        :param flags: O_RDONLY, O_WRONLY, O_RDWR or O_PATH, and what goes with it.
        :raise FileNotFoundError: it is not there; another one, or a link, bears its name.
        :raise OSError: it cannot be opened.
        """
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(_entry(name), flags, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a FIFO or a socket
                raise _another(self.path / name) from None
            raise
        if FileId.of(os.fstat(fd)) != file:
            os.close(fd)
            raise _another(self.path / name)
        return fd

    def make(
        self,
        name: str,
        record: Callable[[FileId], None],
        fill: Callable[[int], None],
        *,
        like: os.stat_result | None = None,
    ) -> int:
        """Make a file, which is never there unrecorded; return its descriptor, read and write.

        Where the file system allows it, it is never there half-written, nor with another owner
        and mode, either.

        :param record: is called with what it will be, before it has a name.
        :param fill: is called with its descriptor, to write to it.
        :param like: whose owner and mode it gets; None: ours, and 0600.
        :raise FileExistsError: there is something of that name.
        :raise OSError: it cannot be made.
        """
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            fd = os.open(".", os.O_TMPFILE | flags, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            nameless = False  # NFS, say
            fd = os.open(
                _entry(name), os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | flags, 0o600, dir_fd=self.fd
            )
        else:
            nameless = True
        try:
            made = FileId.of(os.fstat(fd))
            assert made is not None  # it is a regular file
            if not nameless:
                record(made)
            if like is not None:
                if os.geteuid() == 0:
                    os.fchown(fd, like.st_uid, like.st_gid)
                os.fchmod(fd, like.st_mode & 0o777)
            fill(fd)
            if nameless:
                record(made)
                # src_dir_fd is not used with an absolute path, but has os.link call linkat(2).
                os.link(
                    f"/proc/self/fd/{fd}",
                    _entry(name),
                    src_dir_fd=fd,
                    dst_dir_fd=self.fd,
                    follow_symlinks=True,
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def remove(self, name: str, file: FileId) -> bool:
        """Remove a file, if that name still is it; return whether it was.

        :raise OSError: it cannot be removed.
        """
        if not self.holds(name, file):
            return False
        try:
            os.unlink(_entry(name), dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def rename(self, name: str, file: FileId, to: str) -> None:
        """Give a file another name, which nothing bears.

        :raise FileExistsError: something does.
        :raise FileNotFoundError: that name is not that file any more.
        :raise OSError: it cannot be renamed.
        """
        if not self.holds(name, file):
            raise _another(self.path / name)
        old, new, fd = _entry(name), _entry(to), self.fd
        try:
            os.link(old, new, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if self.status(new) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
            os.rename(old, new, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            os.unlink(old, dir_fd=fd)

    def replace(self, name: str, file: FileId, to: str) -> None:
        """Give a file another name; a plain file that bears that goes.

        :raise FileExistsError: something else bears it: a link, a FIFO, a directory.
        :raise FileNotFoundError: `name` is not that file any more.
        :raise OSError: it cannot be renamed.
        """
        there = self.status(to)
        if there is None:
            self.rename(name, file, to)
            return
        if not stat.S_ISREG(there.st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to)
        if not self.holds(name, file):
            raise _another(self.path / name)
        os.rename(_entry(name), _entry(to), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def sync(self) -> None:
        """Have what its names are on stable storage.

        :raise OSError: it cannot be.
        """
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def is_ours(self) -> bool:
        """Whether it belongs to this process's user, and nobody else may write to it."""
        status = os.fstat(self.fd)
        return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o022


def look(path: str | os.PathLike[str]) -> int:
    """Open a file for looking at it alone (O_PATH), which gives no right to it and does nothing.

    :raise OSError: it is not there; or (as root) the way leads through a link of another user, who
        may not read it.
    """
    if os.geteuid() == 0:
        return walk(Path(path), os.R_OK, search=True)
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def open_plain(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    *,
    among: Collection[FileId] | None = None,
) -> int:
    """Open a regular file or a block device by its path, and nothing else: nothing waits for it.

    Looked at before it is opened: what opening does to a FIFO or to a device does not happen.

    :param among: what it must be one of: then the way there proves nothing, and is not looked at.
    :raise OSError: it cannot be opened, or is something else.
    """
    pinned = look(path) if among is None else os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        file = FileId.of(os.fstat(pinned))
        if file is None:
            raise OSError(errno.EINVAL, "no regular file and no block device", str(path))
        if among is not None and file not in among:
            raise _another(Path(path))
        return os.open(
            f"/proc/self/fd/{pinned}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        )
    finally:
        os.close(pinned)


def write_file(path: str | os.PathLike[str], data: bytes, begins: tuple[bytes, ...]) -> None:
    """Write to a file that a person has named, instead of what it holds; make it if there is none.

    As root, by no link of another user's to what that one may not write to.

    :param begins: how files of that kind begin: one that holds anything else, as a disk image
        that was named by mistake, is left as it is.
    :raise FileExistsError: it holds something else.
    :raise OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO nobody reads
    if os.geteuid() != 0:
        fd = os.open(path, flags | os.O_CREAT, 0o666)
    else:
        try:
            found = walk(Path(path), os.W_OK, search=True)
        except FileNotFoundError:
            folder, name = posixpath.split(os.fspath(path))
            with Directory(folder or ".") as directory:
                flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                fd = os.open(_entry(name), flags, 0o666, dir_fd=directory.fd)
        else:
            try:
                fd = os.open(f"/proc/self/fd/{found}", flags)
            finally:
                os.close(found)
    os.set_blocking(fd, True)
    with os.fdopen(fd, "wb") as file:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            check_kind(f"/proc/self/fd/{fd}", begins)
            os.ftruncate(fd, 0)
        file.write(data)


def check_kind(path: str | os.PathLike[str], begins: tuple[bytes, ...]) -> None:
    """See that a file holds what begins so, or nothing; or is none.

    So what a person has named by mistake, a disk image say, is not written over.

    :raise FileExistsError: it holds something else.
    :raise OSError: it cannot be read.
    """
    if not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        held = file.read(max(map(len, begins)))
    if held and not held.startswith(begins):
        raise FileExistsError(errno.EEXIST, "it exists, and holds something else", path)


def remove(path: str | os.PathLike[str], file: FileId) -> bool:
    """Remove a file, if its path still leads to it; return whether it did.

    :raise OSError: it cannot be removed.
    """
    folder, name = posixpath.split(os.fspath(path))
    try:
        directory = Directory(folder or ".")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with directory:
        return directory.remove(name, file)


def rename(path: str | os.PathLike[str], file: FileId, to: str) -> None:
    """Give a file another path, in the same directory, which nothing bears.

    See `Directory.rename`.
    """
    folder, name = posixpath.split(os.fspath(path))
    with Directory(folder or ".") as directory:
        directory.rename(name, file, posixpath.basename(to))
        directory.sync()


def keep(path: str | os.PathLike[str], file: FileId, to: str) -> None:
    """Give a file that is not whole the path that says so, in the same directory. Idempotent.

    Where something bears that already, the file is removed: none bears its own that is not whole.

    :raise OSError: it can be neither renamed nor removed.
    """
    try:
        rename(path, file, to)
    except FileExistsError:
        remove(path, file)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever did it was killed before he could say so


def _entry(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is not the name of an entry of a directory")
    return name


def _another(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "another file, or a link, bears its name", str(path))
