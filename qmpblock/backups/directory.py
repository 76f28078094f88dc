"""A directory of backups: what is in it, who is at work on it, and the step by which one is made.

::

    WHEN-DISK.qcow2       images; those of increments name, beside them, what they lie on
    WHEN.json             the point: written when all of that is on stable storage, and renamed into
                          place. That it is there is what makes the backup one
    WHEN.begun            which files are about to be made
    .qmpblock-backup.lock held (flock) by whoever makes one

Whoever is killed leaves WHEN.begun. Without WHEN.json what it lists is nothing, and goes when the
next one begins; with it, only itself does. What no such file lists is nobody's to remove.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpblock.backups.maker import check_free, locked, unwritable
from qmpblock.backups.point import Point, is_image_name
from qmpblock.errors import UNTOUCHED, Error, RecordError, RequestError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.ourfiles import Directory
from qmpblock.names import (
    BACKUP_LOCK_FILE,
    backup_when,
    begun_file,
    is_run,
    partial_file,
    point_file,
)
from qmpblock.peerjson import read_json
from qmpblock.versioned import UnreadableError, plain, stamped, unstamped
from qmpblock.versioned import read as read_fields

__all__ = ["Backups", "absolute", "foresee_backups", "open_backups", "read_points"]

_LARGEST = 64 << 20  # bytes of a point file
_KNOWN = (BACKUP_LOCK_FILE, "lost+found")  # what an empty directory may hold
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True)
class _Begun:
    """What WHEN.begun says: the id of the directory, and which images are about to be made."""

    backups: str
    images: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    def check(self, when: str) -> None:
        """See that it can be: whoever wrote it may have been anybody.

        :raise UnreadableError: it cannot.
        """
        if not is_run(self.backups):
            raise UnreadableError("its id is none")
        for name in self.images:
            if not (is_image_name(name) and name.startswith(f"{when}-")):
                raise UnreadableError(f"{printable(name)} is the name of no image of it")


@dataclass
class Backups:
    """An open directory of backups.

    :ivar path: absolute.
    :ivar points: what is made, oldest first.
    """

    path: str
    files: Directory
    points: list[Point] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Of the directory; empty where nothing was ever begun.

        Also that of one that was broken off: by it is called what it has left in the VM.
        """
        if self.points:
            return self.points[-1].backups
        return next((one.backups for when in self._every_begun() if (one := self._begun(when))), "")

    @property
    def next_number(self) -> int:
        """Of the next backup."""
        return self.points[-1].number + 1 if self.points else 1

    def place(self, name: str) -> str:
        """Return the path of a file in it."""
        return posixpath.join(self.path, name)

    @property
    def home(self) -> str:
        """The directory in which its files lie; or, where it is still to be made, itself will."""
        return self.path

    def identity(self) -> tuple[int, int]:
        """Return its device and inode."""
        status = os.fstat(self.files.fd)
        return status.st_dev, status.st_ino

    def names(self) -> list[str]:
        """Return the names of what lies there."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.files.fd)
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208  it has no path
        finally:
            os.close(fd)

    def status(self, name: str) -> os.stat_result | None:
        """Look at a regular file in it; None where there is none of that name.

        :raise OSError: it cannot be looked at.
        """
        status = self.files.status(name)
        return status if status is not None and stat.S_ISREG(status.st_mode) else None

    def open(self, name: str) -> int:
        """Open a regular file in it, to read it.

        :raise OSError: it cannot be opened, or is none.
        """
        fd = os.open(name, _READ, dir_fd=self.files.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "it is no regular file", name)
        return fd

    # -- by whoever makes one, under the lock

    def begin(self, when: str, backups: str, images: Sequence[str]) -> None:
        """Say, on stable storage, which images are about to be made.

        :param backups: the id of the directory.
        :raise Error: it cannot be said.
        """
        self._write(begun_file(when), stamped(plain(_Begun(backups, tuple(images)))))

    def make(self, point: Point) -> None:
        """Have a backup be made: all of its images are on stable storage.

        :raise Error: it is not.
        """
        name = point_file(point.when)
        try:
            self._write(name, point.as_json())
        except Error:
            with contextlib.suppress(OSError):
                self._remove(name)  # it may have got its name: then it is not certain to keep it
            raise
        self.points.append(point)

    def end(self, when: str, *, keeps_id: bool = False) -> None:
        """Remove what says that a backup was begun; and, where it is not made, its images.

        :param keeps_id: leave the former, for the id of the directory, if nothing else has that.
        :raise Error: they cannot be removed.
        """
        name = begun_file(when)
        try:
            if self.status(point_file(when)) is None:
                for left in self._left(when):
                    self._remove(left)
            for done in (partial_file(point_file(when)), name, partial_file(name)):
                if done != name or self.points or not keeps_id:
                    self._remove(done)
            self.files.sync()
        except OSError as error:
            raise Error(
                f"cannot remove what a backup left in {printable(self.path)}: {error.strerror}",
            ) from None

    def sweep(self, but: str) -> None:
        """Remove what backups left that were broken off; nobody is at work, for we have the lock.

        :param but: which one has just begun.
        :raise Error: it cannot be removed, or read.
        """
        for when in self._every_begun():
            if when != but:
                self.end(when)

    def begun(self) -> dict[str, tuple[str, ...]]:
        """Return what backups that were begun, and have not ended, may have there, by their WHENs.

        What cannot be read tells of nothing.
        """
        found = {}
        for when in self._every_begun():
            with contextlib.suppress(RecordError):
                found[when] = (begun_file(when), *self._left(when))
        return found

    def _every_begun(self) -> list[str]:
        """Return what the backups are called that were begun, and have not ended.

        Also one of which only that was about to be said.
        """
        known = {backup_when(name.removesuffix(partial_file(""))) for name in self.names()}
        return sorted(one[0] for one in known if one is not None and not one[1])

    def _begun(self, when: str) -> _Begun | None:
        """Return what a backup that was begun says; None where none was."""
        try:
            begun = read_fields(_Begun, unstamped(self._read(begun_file(when))))
            begun.check(when)
        except FileNotFoundError:
            return None
        except (UnreadableError, ValueError) as error:
            raise _unreadable(self.place(begun_file(when)), error) from None
        except OSError as error:
            raise _unreadable(self.place(begun_file(when)), error.strerror) from None
        return begun

    def _left(self, when: str) -> list[str]:
        """Return the names of all that a backup that was begun may have left, besides its file."""
        begun = self._begun(when)
        made = {one.file for point in self.points for one in point.disks}
        ours = [one for one in begun.images if one not in made] if begun is not None else []
        return [*ours, *map(partial_file, (*ours, point_file(when), begun_file(when)))]

    def _remove(self, name: str) -> None:
        status = self.status(name)
        file = None if status is None else FileId.of(status)
        if file is not None:
            self.files.remove(name, file)

    def _write(self, name: str, document: Any) -> None:
        """Write a file that is never there in part."""
        data = (json.dumps(document, indent=1) + "\n").encode()
        part = partial_file(name)

        def fill(fd: int) -> None:
            os.fchmod(fd, 0o644)
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)

        try:
            self._remove(part)
            made: list[FileId] = []
            os.close(self.files.make(part, made.append, fill))
            self.files.rename(part, made[-1], name)
            self.files.sync()
        except OSError as error:
            raise self._cannot_write(name, error.strerror) from None

    def _read(self, name: str) -> Any:
        """Return the JSON of a file in it.

        :raise FileNotFoundError: there is none.
        :raise ValueError: it is none.
        :raise OSError: it cannot be read.
        """
        with os.fdopen(self.open(name), "rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError("it is too large")
        return read_json(data)

    # -- reading

    def read(self) -> dict[str, RecordError]:
        """Read the points; return why those cannot be read that cannot, by their files' names."""
        points, unread = [], {}
        for name in self.names():
            known = backup_when(name)
            if known is None or not known[1]:
                continue
            try:
                points.append(Point.from_json(self._read(name), known[0]))
            except FileNotFoundError:
                continue  # a link, a directory
            except (UnreadableError, ValueError) as error:
                unread[name] = _unreadable(self.place(name), error)
            except OSError as error:
                unread[name] = _unreadable(self.place(name), error.strerror)
        self.points = sorted(points, key=lambda one: (one.number, one.moment, one.when))
        return unread

    def check_one(self) -> None:
        """Refuse a directory that was put together from more than one.

        :raise RequestError: it was.
        """
        for point in self.points:
            if point.backups != self.id:
                raise RequestError(
                    f"{printable(self.path)} holds backups of more than one directory: "
                    f"{self.points[-1].when} and {point.when}",
                    standing=UNTOUCHED,
                    remedy="keep each directory's backups apart",
                )

    def check_new(self) -> None:
        """Refuse a directory that holds anything, but no backup.

        :raise RequestError: it does.
        """
        if self.points:
            return
        known = {*_KNOWN}
        for when in self._every_begun():
            known |= {begun_file(when), *self._left(when)}
        others = [name for name in self.names() if name not in known]
        if others:
            raise RequestError(
                f"{printable(self.path)} holds no backups, but other things, such as "
                f"{printable(others[0])}",
                standing=UNTOUCHED,
                remedy="name a directory of backups, an empty one, or one that is to be made",
            )

    def locked(self) -> AbstractContextManager[None]:
        """Be the only one who makes a backup there, while this lasts. See `locked`."""
        return locked(self.path, self.files)

    def check_free(self) -> None:
        """Refuse what `locked` would refuse; nothing is made. See `check_free`."""
        check_free(self.path, self.files)

    def check_begin(self, when: str) -> None:
        """Refuse what `begin` and `sweep` would, as far as that can be told; nothing is made.

        :raise Error: no file could be made there.
        :raise RecordError: what a backup left that was broken off cannot be read.
        """
        if (why := unwritable(self.files)) is not None:
            raise self._cannot_write(begun_file(when), why)
        for left in self._every_begun():
            self._left(left)

    def _cannot_write(self, name: str, why: object) -> Error:
        return Error(f"cannot write {printable(self.place(name))}: {why}")


@dataclass
class _Unmade(Backups):
    """A directory of backups that is still to be made; `files` is what it will lie in."""

    @property
    def home(self) -> str:
        return str(self.files.path)

    def names(self) -> list[str]:
        return []

    def check_free(self) -> None:
        pass  # nobody can have it

    def check_begin(self, when: str) -> None:
        pass  # it will be ours


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a directory that somebody named, without resolving links.

    :raise RequestError: nothing is named: an empty word is a variable that was not set, not the
        directory in which one happens to be.
    """
    name = os.fspath(path)
    if not name:
        raise RequestError("the directory has no name: it is empty", standing=UNTOUCHED)
    return os.path.normpath(Path.cwd() / name)


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeError:
        raise RequestError(
            f"the directory {printable(path)} is not UTF-8, and QMP can carry nothing else",
            standing=UNTOUCHED,
            remedy="name one whose whole path is",
        ) from None


def _check_ours(backups: Backups) -> None:
    """Refuse a directory of other things before a file of ours comes to lie there.

    :raise RequestError: it is one.
    """
    if backups.read():
        return  # whose point files cannot be read: which is said later
    try:
        backups.check_new()
    except RequestError:
        if backups.files.status(BACKUP_LOCK_FILE) is None:  # else somebody has begun meanwhile
            raise


@contextmanager
def open_backups(path: str | os.PathLike[str], *, make: bool = False) -> Iterator[Backups]:
    """Open a directory of backups, while this lasts.

    :param make: make it, if it is not there; what it lies in is. It goes again, and the file that
        is locked from any, where no backup is made in it.
    :raise RequestError: there is none, QEMU cannot be told of it, or it is to be made and holds
        other things.
    """
    name = absolute(path)
    if make:
        _check_utf8(name)
    fresh = False
    try:
        if make:
            with contextlib.suppress(FileExistsError):
                Path(name).mkdir(mode=0o755)
                fresh = True
        files = Directory(name)
    except (OSError, ValueError) as error:
        raise _cannot_open(name, getattr(error, "strerror", None) or error) from None
    with files:
        backups = Backups(name, files)
        bare = make and backups.files.status(BACKUP_LOCK_FILE) is None
        try:
            if bare:
                _check_ours(backups)
            yield backups
        finally:
            if bare and not backups.points:
                # It is not empty; or somebody else has begun one there.
                with contextlib.suppress(OSError, Error), backups.locked():
                    os.unlink(BACKUP_LOCK_FILE, dir_fd=files.fd)
                    if fresh:
                        Path(name).rmdir()


@contextmanager
def foresee_backups(path: str | os.PathLike[str]) -> Iterator[Backups]:
    """Open a directory of backups, while this lasts, as it would be if it were made now.

    :raise RequestError: it is not there, and cannot be made; or QEMU cannot be told of it.
    """
    name = absolute(path)
    _check_utf8(name)
    there = True
    try:
        try:
            os.lstat(name)
        except FileNotFoundError:
            there = False
        files = Directory(name if there else posixpath.dirname(name))
    except (OSError, ValueError) as error:
        raise _cannot_open(name, getattr(error, "strerror", None) or error) from None
    with files:
        if not there and (why := unwritable(files)) is not None:
            raise _cannot_open(name, why)
        yield Backups(name, files) if there else _Unmade(name, files)


def read_points(path: str | os.PathLike[str]) -> tuple[Point, ...]:
    """Return the backups that a directory holds, oldest first. Nothing else is read.

    :raise RequestError: there is no such directory.
    :raise RecordError: one of its point files cannot be read.
    """
    with open_backups(path) as backups:
        for error in backups.read().values():
            raise error
        return tuple(backups.points)


def _cannot_open(path: str, why: object) -> RequestError:
    return RequestError(f"cannot open the directory {printable(path)}: {why}", standing=UNTOUCHED)


def _unreadable(path: str, why: object) -> RecordError:
    return RecordError(
        f"{printable(path)} cannot be read: {printable(why)}",
        standing="nothing that it tells of was touched",
        remedy="have the qmpblock that wrote it, or a newer one, read it; if it is damaged, move "
        "it away: what it tells of counts for nothing then",
        path=Path(path),
    )
