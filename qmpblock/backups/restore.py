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
import resource
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.backups.directory import Backups, absolute, open_backups
from qmpblock.backups.imagefile import Proven
from qmpblock.backups.point import (
    DiskBackup,
    Image,
    Point,
    every_image,
    find_point,
    images_of,
    nearest_with,
    restored_format,
    restored_names,
)
from qmpblock.copying.meter import Meter
from qmpblock.copying.targetname import check_name, check_unopened
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    NoRoomError,
    RequestError,
    UnsupportedError,
    printable,
    shell_words,
)
from qmpblock.graph.places import FileId
from qmpblock.host.contents import Contents
from qmpblock.host.imagechain import Image as ImageOfChain
from qmpblock.host.imagechain import blockdev
from qmpblock.host.keycommand import keyed
from qmpblock.host.ourfiles import Directory
from qmpblock.host.qemuimgconvert import QemuImgConvert
from qmpblock.names import partial_file

if TYPE_CHECKING:
    from qmpblock.qemu.job import Progress

__all__ = ["DiskRestored", "Restored", "restore"]

_NONE = "nothing is left of what was being restored"
_AT_ONCE = 200  # images of a chain; of 400 qemu-img takes half a minute before it copies anything
_FDS_EACH, _OTHER_FDS = 4, 64  # descriptors: of an image, here and in qemu-img; and of all else
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
    named: bool = field(default=False)

    @property
    def partial(self) -> str:
        """What it is called until all are whole."""
        return partial_file(self.name)

    @property
    def path(self) -> str:
        """By which it is found in the end."""
        return posixpath.join(str(self.directory.path), self.name)

    async def make(
        self,
        backups: Backups,
        proven: Proven,
        tell: Callable[[float], None],
        stall: float,
        *,
        force: bool,
    ) -> None:
        """Make it, on stable storage, not under its name yet.

        :param proven: what it is made of.
        :raise Error: it cannot be made.
        """
        fmt, size = restored_format(self.backup), self.backup.size
        tool = QemuImgConvert(stall=stall)
        contents = Contents(size, ())
        if fmt != "raw":
            contents = await tool.create(fmt, size, _HEADER)

        lengths, done = sum(image.backup.length for image in self.chain), 0
        with ExitStack() as stack:
            with _needed(backups, _NONE):
                stack.callback(os.close, top := await proven.open(self.chain[0]))
            try:
                fd = self._fresh(contents, os.fstat(top), force=force)
                stack.callback(os.close, fd)
                for number, part in enumerate(_parts(self.chain)):
                    length = sum(image.backup.length for image in part)

                    def told(share: float, before: int = done, length: int = length) -> None:
                        tell((before + share * length) / max(1, lengths))

                    held = {self.chain[0].file: top}
                    await self._take(
                        *(tool, fmt, part, held, fd, backups, proven, told),
                        onto=size if number else None,
                    )
                    done += length
                await asyncio.to_thread(os.fsync, fd)
            except OSError as error:
                raise self._cannot(error) from None

    async def _take(
        self,
        tool: QemuImgConvert,
        fmt: str,
        part: Sequence[Image],
        held: Mapping[str, int],
        fd: int,
        backups: Backups,
        proven: Proven,
        tell: Callable[[float], None],
        *,
        onto: int | None,
    ) -> None:
        """Have images that lie on each other be in it, the newest first.

        :param held: descriptors of images that are open, by their files.
        :param fd: of its file.
        :param onto: as of `QemuImgConvert.convert`.
        :raise Error: that cannot be.
        """
        size = self.backup.size
        places = [backups.place(image.file) for image in part]
        opened: dict[str, int] = {}
        with ExitStack() as stack:
            with _needed(backups, _NONE):
                for place, image in zip(places, part, strict=True):
                    if (open_now := held.get(image.file)) is None:
                        opened[place] = await proven.open(image)
                        stack.callback(os.close, opened[place])
                    else:
                        opened[place] = open_now
            target = posixpath.join(str(self.directory.path), self.partial)
            below = [ImageOfChain(place, "qcow2", size) for place in places[1:]]
            source = blockdev("qcow2", places[0], below)
            files = opened | {target: fd}
            await tool.convert(source, target, fmt, opened=files, progress=tell, onto=onto)
            with _needed(backups, _NONE):
                for place, image in zip(places, part, strict=True):
                    await proven.check(image, opened[place])  # nobody has written to one meanwhile

    def _fresh(self, contents: Contents, like: os.stat_result, *, force: bool) -> int:
        """Make it empty, owned as the backup is; return its descriptor."""

        def note(made: FileId) -> None:
            self.made = made

        if force and (left := self.directory.status(self.partial)) is not None:
            file = FileId.of(left)
            if file is not None:  # what is no file stays: then this is not made
                self.directory.remove(self.partial, file)
        return self.directory.make(self.partial, note, contents.write_to, like=like)

    def name_it(self, *, force: bool) -> None:
        """Give it its name.

        :param force: what bears it goes, if it is a plain file that nobody has open.
        :raise InUseError: somebody has.
        :raise Error: that cannot be.
        """
        assert self.made is not None  # make() went before
        try:
            if force:
                if (there := self.directory.status(self.name)) is not None:
                    check_unopened(self.path, there, standing=None)
                self.directory.replace(self.partial, self.made, self.name)
            else:
                self.directory.rename(self.partial, self.made, self.name)
        except OSError as error:
            raise self._cannot(error) from None
        self.named = True

    def remove(self, *, named: bool) -> None:
        """Leave nothing of it.

        :param named: also where it has its name already.
        """
        if self.made is not None:
            with contextlib.suppress(OSError):
                self.directory.remove(self.partial, self.made)
                if named:
                    self.directory.remove(self.name, self.made)

    def _cannot(self, error: OSError) -> Error:
        words = f"cannot make {printable(self.path)}: {error.strerror}"
        return NoRoomError(words) if error.errno == errno.ENOSPC else Error(words)


def _parts(chain: Sequence[Image]) -> Iterator[Sequence[Image]]:
    """Return what of a chain is taken at once, the oldest first.

    To open images that lie on each other takes qemu-img a time that grows by their number's square,
    and descriptors, of which there may be few. So above so many each is taken by itself.

    :param chain: the newest first.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        most = max(1, (most - _OTHER_FDS) // _FDS_EACH)
    at_once = _AT_ONCE if most == resource.RLIM_INFINITY else min(_AT_ONCE, most)
    above, lowest = chain[:-at_once], chain[-at_once:]
    yield lowest
    for image in reversed(above):
        yield (image,)


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
        names = restored_names(wanted)
        folder = absolute(target)
        chains = [
            _chain(backups, one, posixpath.join(folder, name))
            for one, name in zip(wanted, names, strict=True)
        ]
        into = stack.enter_context(_opened(folder))
        _check_elsewhere(backups, into)
        targets = [_Target(*one, into) for one in zip(wanted, chains, names, strict=True)]
        for one in targets:
            _check(one, force=force)
        proven = await _prove(backups, targets, progress)
        try:
            await _restore(backups, targets, proven, progress, stall, force=force)
        except BaseException as error:
            for one in targets:
                one.remove(named=not force)  # what was replaced is gone: so that stays
            if isinstance(error, Error) and error.standing is None:
                stays = [printable(one.path) for one in targets if force and one.named]
                error.standing = f"restored, and left: {', '.join(stays)}" if stays else _NONE
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
        command = shell_words(("qmpblock", *words))
        last = backups.points.index(other) < backups.points.index(point)
        which = "the newest backup before it" if last else "the first backup after it"
        remedy = f"{which} that has that disk is {other.when}: {command}"
    return point.disk(name, remedy)


def _chain(backups: Backups, one: DiskBackup, target: str) -> tuple[Image, ...]:
    """Return what a disk is restored from.

    :param target: the path that it is to have.
    :raise Error: it cannot be.
    """
    chain = images_of(every_image(backups.points), one.file)
    if any(image.backup.encrypted for image in chain):
        check = shell_words(["qmpblock", "backup", "check", backups.path])
        raise UnsupportedError(
            f"{printable(one.file)} is encrypted with the key of its disk, which is not here",
            standing=UNTOUCHED,
            remedy=f"see whether it is whole ({check}), then convert it with the key, into an "
            f"image that has the same one: {_conversion(backups, chain, target)}",
        )
    return chain


def _conversion(backups: Backups, chain: tuple[Image, ...], target: str) -> str:
    """Return the command that restores an encrypted disk."""
    places = {backups.place(image.file): image.backup.encrypted for image in chain}
    files, size = list(places), chain[0].backup.size
    source = blockdev("qcow2", files[0], [ImageOfChain(file, "qcow2", size) for file in files[1:]])
    name, keys = keyed(source, lambda options: places[options["file"]["filename"]])
    made = ["-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key"]
    make = shell_words(["mkdir", "-p", posixpath.dirname(target)])
    return f"{make} && {shell_words(['qemu-img', 'convert', *keys, *made, name, target])}"


@contextmanager
def _opened(path: str) -> Iterator[Directory]:
    """Open the directory of what is restored, and make it, if it is not there.

    :raise RequestError: it is none.
    """
    fresh = False
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


def _check_elsewhere(backups: Backups, into: Directory) -> None:
    """Refuse to restore into the directory of the backups: --force could replace one of these.

    :raise RequestError: it is that.
    """
    status = os.fstat(into.fd)
    if (status.st_dev, status.st_ino) == backups.identity():
        raise RequestError(
            f"{printable(backups.path)} is the directory of the backups, and holds nothing else",
            standing=UNTOUCHED,
            remedy="name another directory to restore into; it is made, if it is not there",
        )


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
) -> Proven:
    """See that every file that is needed is what it was, and return what is known of them then.

    :raise Error: one is not.
    """
    images = {image.file: image for one in targets for image in one.chain}
    meter = Meter("digesting", sum(one.backup.length for one in images.values()), progress)
    read = 0

    def tell(more: int) -> None:
        nonlocal read
        read += more
        meter.set(read)

    proven = Proven(backups, tell)
    with _needed(backups, UNTOUCHED):
        for image in images.values():
            os.close(await proven.open(image))
    return proven


@contextmanager
def _needed(backups: Backups, standing: str) -> Iterator[None]:
    """Say of an image that is not what it was why that is a failure, and what to do."""
    try:
        yield
    except Error as error:
        raise Error(
            f"{printable(backups.path)}: {error.message}, and it is needed to restore that",
            standing=standing,
            remedy="see which backups are whole, and restore one of these: qmpblock backup check "
            + shell_words([backups.path]),
        ) from None


async def _restore(
    backups: Backups,
    targets: Sequence[_Target],
    proven: Proven,
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

        await one.make(backups, proven, tell, stall, force=force)
        done += size
    for one in targets:
        if force and (there := one.directory.status(one.name)) is not None:
            check_unopened(one.path, there, standing=None)
    for one in targets:
        one.name_it(force=force)
    # Nobody is waited for from the first name on: cancelled here, files that were replaced would
    # be gone, and that would be said to be undone.
    targets[0].directory.sync()
