"""Restoring disks from backups: as images of their own, which no backup lies below.

A disk that is restored is there to be started from. So it holds everything by itself: nothing that
its guest does reaches the backups, these can be moved or removed, and its format is what the disk's
was. (Whoever wants no copy has the chain itself, which any QEMU opens.)

Every byte of what it is made of is proven first, by the digests of the backups. It is called
FILE.partial until all disks are whole, and on stable storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
import shlex
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.backups.directory import Backups, open_backups
from qmpblock.backups.imagefile import why_wrong
from qmpblock.backups.point import (
    DiskBackup,
    Image,
    Point,
    find_point,
    images_of,
    nearest_with,
    restored_format,
    restored_names,
)
from qmpblock.copying.meter import Meter
from qmpblock.copying.targetname import check_name, check_unopened
from qmpblock.errors import UNTOUCHED, Error, NoRoomError, RequestError, UnsupportedError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.contents import Contents
from qmpblock.host.imagechain import Image as ImageOfChain
from qmpblock.host.imagechain import blockdev
from qmpblock.host.ourfiles import Directory
from qmpblock.host.qemuimgconvert import QemuImgConvert
from qmpblock.names import partial_file

if TYPE_CHECKING:
    from qmpblock.qemu.job import Progress

__all__ = ["DiskRestored", "Restored", "restore"]

_HEADER: dict[str, str | int] = {"compat": "1.1", "lazy_refcounts": "off"}


@dataclass(frozen=True)
class DiskRestored:
    """One disk that was restored.

    :ivar target: the file that holds it; `format`: its.
    :ivar size: of the disk, in bytes.
    :ivar images: the files that it was made of, the newest first.
    """

    disk: str
    target: str
    format: str
    size: int
    images: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What was restored.

    :ivar when: what the backup is called; `time`: of the instant of which it is.
    """

    directory: str
    when: str
    time: str
    disks: tuple[DiskRestored, ...]
    seconds: float


@dataclass
class _Target:
    """One disk while it is restored."""

    backup: DiskBackup
    chain: tuple[Image, ...]
    name: str
    directory: Directory
    made: FileId | None = field(default=None)

    @property
    def partial(self) -> str:
        """What it is called until all are whole."""
        return partial_file(self.name)

    @property
    def path(self) -> str:
        """By which it is found in the end."""
        return posixpath.join(str(self.directory.path), self.name)

    async def make(
        self, backups: Backups, tell: Callable[[float], None], stall: float, *, force: bool
    ) -> None:
        """Make it, on stable storage, not under its name yet.

        :raise Error: it cannot be made.
        """
        fmt, size = restored_format(self.backup), self.backup.size
        tool = QemuImgConvert(stall=stall)
        contents = Contents(size, ())
        if fmt != "raw":
            contents = await tool.create(fmt, size, _HEADER)

        def note(made: FileId) -> None:
            self.made = made

        try:
            fd = self._fresh(contents, note, backups, force=force)
        except OSError as error:
            raise self._cannot(error) from None
        try:
            assert self.made is not None  # note() was called
            files = [backups.place(image.file) for image in self.chain]
            below = [ImageOfChain(file, "qcow2", size) for file in files[1:]]
            source = blockdev("qcow2", files[0], below)
            place = posixpath.join(str(self.directory.path), self.partial)
            await tool.convert(source, place, fmt, self.made, progress=tell)
            await asyncio.to_thread(os.fsync, fd)
        except OSError as error:
            raise self._cannot(error) from None
        finally:
            os.close(fd)

    def _fresh(
        self, contents: Contents, note: Callable[[FileId], None], backups: Backups, *, force: bool
    ) -> int:
        """Make it empty, owned as the backup is; return its descriptor."""
        if force and (left := self.directory.status(self.partial)) is not None:
            self.directory.remove(self.partial, _file(left))
        like = backups.status(self.backup.file)
        return self.directory.make(self.partial, note, contents.write_to, like=like)

    def name_it(self, *, force: bool) -> None:
        """Give it its name.

        :raise Error: that cannot be.
        """
        assert self.made is not None  # make() went before
        fd = self.directory.fd
        try:
            if force:
                os.rename(self.partial, self.name, src_dir_fd=fd, dst_dir_fd=fd)
            else:
                self.directory.rename(self.partial, self.made, self.name)
        except OSError as error:
            raise self._cannot(error) from None

    def remove(self) -> None:
        """Leave nothing of it that is not whole."""
        if self.made is not None:
            with contextlib.suppress(OSError):
                self.directory.remove(self.partial, self.made)

    def _cannot(self, error: OSError) -> Error:
        words = f"cannot make {printable(self.path)}: {error.strerror}"
        return NoRoomError(words) if error.errno == errno.ENOSPC else Error(words)


def _file(status: os.stat_result) -> FileId:
    file = FileId.of(status)
    assert file is not None  # it is a regular file
    return file


async def restore(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    at: str | None = None,
    disks: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stall: float = 60.0,
) -> Restored:
    """Restore disks from a directory of backups; no VM is needed.

    Each disk becomes an image DISK.FORMAT, of the format that its active layer had, which holds
    everything by itself. All or none; cancelled or failed, nothing is left.

    :param target: the directory of the restored images; it is made if it is not there.
    :param at: which backup: what it is called (WHEN), or a time in ISO 8601, local where it does
        not say: the newest one that is not younger. None: the newest.
    :param disks: which of its disks; none: all.
    :param force: replace files of those names, unless somebody has them open.
    :param progress: is told how far it is.
    :param stall: seconds in which qemu-img does nothing that count as a failure.
    :raise RequestError: there is no such backup or disk, or a file of that name; nothing was
        touched.
    :raise UnsupportedError: a disk is encrypted: only its key would open it; nothing was touched.
    :raise RecordError: a point file cannot be read; nothing was touched.
    :raise InUseError: somebody has open what was to be replaced.
    :raise NoRoomError: there is no space for them.
    :raise Error: an image is not what it was.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        backups = stack.enter_context(open_backups(directory))
        for error in backups.read().values():
            raise error
        point = find_point(backups.points, at)
        chosen = [_disk(backups, point, name, target) for name in disks]
        wanted = tuple(dict.fromkeys(chosen)) or point.disks
        chains = [_chain(backups, one) for one in wanted]
        into = stack.enter_context(_opened(target))
        names = restored_names(wanted)
        targets = [_Target(*one, into) for one in zip(wanted, chains, names, strict=True)]
        for one in targets:
            _check(one, force=force)
        await _prove(backups, targets, progress)
        try:
            await _restore(backups, targets, progress, stall, force=force)
        except BaseException:
            for one in targets:
                one.remove()
            raise
    return Restored(
        backups.path,
        point.when,
        point.time,
        tuple(
            DiskRestored(
                one.backup.disk,
                one.path,
                restored_format(one.backup),
                one.backup.size,
                tuple(image.file for image in one.chain),
            )
            for one in targets
        ),
        time.monotonic() - started,
    )


def _disk(backups: Backups, point: Point, name: str, target: str | os.PathLike[str]) -> DiskBackup:
    """Return a disk of a backup.

    :raise NotFoundError: it has none of that name; says which backup has.
    """
    remedy = None
    if not point.has(name) and (other := nearest_with(backups.points, point, name)) is not None:
        words = ("restore", backups.path, os.fspath(target), "--at", other.when, "--disk", name)
        command = " ".join(shlex.quote(printable(word)) for word in ("qmpblock", *words))
        last = backups.points.index(other) < backups.points.index(point)
        which = "the newest backup before it" if last else "the first backup after it"
        remedy = f"{which} that has that disk is {other.when}: {command}"
    return point.disk(name, remedy)


def _chain(backups: Backups, one: DiskBackup) -> tuple[Image, ...]:
    """Return what a disk is restored from.

    :raise Error: it cannot be.
    """
    if one.encrypted:
        raise UnsupportedError(
            f"{printable(one.file)} is encrypted with the key of its disk, which is not here",
            standing=UNTOUCHED,
            remedy="have qemu-img convert it, with --object secret,...; or start the VM from a "
            "copy of it, and of what it lies on",
        )
    return images_of(backups.points, one.file)


@contextmanager
def _opened(target: str | os.PathLike[str]) -> Iterator[Directory]:
    """Open the directory of what is restored, and make it, if it is not there.

    :raise RequestError: it is none.
    """
    path, fresh = os.path.normpath(Path.cwd() / os.fspath(target)), False
    try:
        with contextlib.suppress(FileExistsError):
            Path(path).mkdir()
            fresh = True
        directory = Directory(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(
            f"cannot open the directory {printable(path)}: {why}", standing=UNTOUCHED
        ) from None
    with directory:
        try:
            yield directory
        except BaseException:
            if fresh:
                with contextlib.suppress(OSError):  # there is something else in it by now
                    Path(path).rmdir()
            raise


def _check(one: _Target, *, force: bool) -> None:
    """Refuse to replace what is not to be replaced.

    :raise RequestError: there is something of that name.
    :raise InUseError: somebody has it open.
    """
    check_name(str(one.directory.path), one.partial)
    for name in (one.name, one.partial):
        status = one.directory.status(name)
        if status is None:
            continue
        path = posixpath.join(str(one.directory.path), name)
        if not force or not stat.S_ISREG(status.st_mode):
            raise RequestError(
                f"{printable(path)} exists already",
                standing=UNTOUCHED,
                remedy="name another directory, or remove that file; --force replaces a plain "
                "file that nobody has open",
            )
        check_unopened(path, status)


async def _prove(
    backups: Backups, targets: Sequence[_Target], progress: Callable[[Progress], None] | None
) -> None:
    """See that every file that is needed is what it was.

    :raise Error: one is not.
    """
    images = {image.file: image for one in targets for image in one.chain}
    meter = Meter("digesting", sum(one.backup.length for one in images.values()), progress)
    read = 0

    def tell(more: int) -> None:
        nonlocal read
        read += more
        meter.set(read)

    for image in images.values():
        why = await why_wrong(backups, image, tell)
        if why is not None:
            raise Error(
                f"{printable(backups.path)}: {why}, and it is needed to restore that",
                standing=UNTOUCHED,
                remedy="see which backups are whole, and restore one of these: qmpblock backup "
                f"check {printable(backups.path)}",
            )


async def _restore(
    backups: Backups,
    targets: Sequence[_Target],
    progress: Callable[[Progress], None] | None,
    stall: float,
    *,
    force: bool,
) -> None:
    """Make all, then give all their names."""
    meter = Meter("restoring", sum(one.backup.size for one in targets), progress)
    done = 0
    for one in targets:
        before, size = done, one.backup.size

        def tell(share: float, before: int = before, size: int = size) -> None:
            meter.set(before + int(share * size))

        await one.make(backups, tell, stall, force=force)
        done += size
    for one in targets:
        if force and (there := one.directory.status(one.name)) is not None:
            check_unopened(one.path, there, standing=None)
    for one in targets:
        one.name_it(force=force)
    await asyncio.to_thread(targets[0].directory.sync)
