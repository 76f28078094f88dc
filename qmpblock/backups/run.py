"""One backup, from the look at its directory to the last trace of it.

::

    lock        of the directory; and, in the VM, of the directory's id
    sweep       what backups that were broken off left in it
    decide      incremental or full, disk by disk; or a refusal: nothing is touched before
    begin       which images are about to be made; which bitmaps, in the VM
    bitmaps     of what the guest writes from now on
    copy        all disks at one instant (`qmpblock.copying.copy`); increments what the bitmaps of
                the backup before say; whole, on stable storage, under their names
    digests     of the images, as they lie there
    make        the point file gets its name: the backup is made, from here on
    end         the bitmaps of the backup before go, then what said that one was begun

What fails before it is made is taken back, and the bitmaps of the backup before count as ever: so a
backup that failed costs no full one. Whoever is cancelled later has a backup, and a result that
says so; what is left to be done for it is done.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar, Unpack

from qmpblock.backups.bitmaps import (
    drawing_nodes,
    goes_back_by_half,
    make_bitmaps,
    others_there,
    survived,
    vouched,
)
from qmpblock.backups.decision import Kind, fallen_back
from qmpblock.backups.directory import Backups, open_backups
from qmpblock.backups.imagefile import digest_of
from qmpblock.backups.job import BackupJob, BackupResult
from qmpblock.backups.look import (
    NO_BACKUP,
    BackupWords,
    check_copies,
    check_disks,
    decided,
    drafted,
    say_none,
    see,
)
from qmpblock.backups.point import (
    DiskBackup,
    Point,
    image_names,
)
from qmpblock.cancellation import undisturbed
from qmpblock.changes.backupnote import BackupNote, delete_bitmaps, undo_dead_backup
from qmpblock.copying.copy import copy
from qmpblock.copying.meter import Meter
from qmpblock.copying.plan import Since
from qmpblock.errors import (
    DisconnectedError,
    Error,
    printable,
)
from qmpblock.names import (
    backup_bitmap,
    backup_lock_name,
    end_bitmap,
    new_run,
    open_bitmap,
    point_file,
)
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.refusals import no_node, tolerate
from qmpblock.versioned import plain

if TYPE_CHECKING:
    from qmpblock.copying.job import CopyJob, CopyResult
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["backup"]

DiskT = TypeVar("DiskT", bound="MappedDisk")


@asynccontextmanager
async def backup(
    vm: Connection,
    directory: str | os.PathLike[str],
    disks: Sequence[DiskT],
    kind: Kind | None = None,
    **words: Unpack[BackupWords],
) -> AsyncIterator[BackupJob]:
    """Back up running disks. See `VM.backup`."""
    job, begun = BackupJob(), asyncio.Event()
    run = _Run(vm, directory, list(disks), kind, words, job, begun)
    work = asyncio.ensure_future(run.run())
    work.add_done_callback(lambda _: begun.set())
    work.add_done_callback(lambda _: job.end())
    try:
        await begun.wait()
        if work.done():
            await work
        yield job
        await work
    except BaseException:
        work.cancel()
        await undisturbed(asyncio.wait({work}))
        if not work.cancelled() and (failed := work.exception()) is not None:
            raise failed from None  # what could not be undone, where it was cancelled
        raise


@dataclass
class _Run:
    """One backup while it is made.

    :ivar begun: is set once the instant has passed of which it is.
    :ivar made: what was made; None: nothing yet.
    """

    vm: Connection
    directory: str | os.PathLike[str]
    disks: list[MappedDisk]
    kind: Kind | None
    words: BackupWords
    job: BackupJob
    begun: asyncio.Event
    run_id: str = field(default_factory=new_run)
    note: BackupNote | None = None
    made: tuple[Point, CopyResult] | None = None

    async def run(self) -> None:
        """Make it.

        :raise Error: it cannot be made, or has failed; what stands is said.
        """
        started = time.monotonic()
        check_disks(self.vm, self.directory, self.disks)
        with open_backups(self.directory, make=True) as backups, backups.locked():
            for error in backups.read().values():
                raise error
            backups.check_one()
            draft = await drafted(self.vm, backups, self.disks)
            names = image_names(draft.when, [disk.name for disk in self.disks])
            try:
                # First, for its id is that of what is done in the VM from here on.
                backups.begin(draft.when, draft.backups, names)
                backups.sweep(but=draft.when)
                async with self._alone(draft):
                    await self._make(backups, draft, names)
            except BaseException as error:
                if self.made is None:
                    say_none(error)
                # An image may have bitmaps of a QEMU that ended, which are called by the id.
                gone = isinstance(error, DisconnectedError)
                left = self._left(backups, draft.when, keeps_id=gone)
                if left and isinstance(error, Error):
                    error.standing = f"{error.standing}; {left}" if error.standing else left
                raise
            else:
                if left := self._left(backups, draft.when):
                    self._warn(left)
            finally:
                if self.made is not None:
                    point, done = self.made
                    seconds = time.monotonic() - started
                    self.job.result = BackupResult(
                        backups.path, point, seconds, done.held, done.verified, self.job.warnings
                    )

    def _left(self, backups: Backups, when: str, *, keeps_id: bool = False) -> str:
        """Have nothing of it be left in the directory but what was made; say what is, and why.

        :param keeps_id: as of `Backups.end`.
        """
        try:
            backups.end(when, keeps_id=keeps_id)
        except Error as error:
            return f"{error.message}: the next backup does"
        return ""

    @asynccontextmanager
    async def _alone(self, draft: Point) -> AsyncIterator[None]:
        """Have no other backup into this directory be made of this VM; undo what one left."""
        name = backup_lock_name(draft.backups)

        async def undo(dead: Holder) -> None:
            await undo_dead_backup(self.vm, dead, name)

        await lock.acquire(self.vm.monitor, name, Holder.me(self.run_id), undo, stall=0)
        try:
            yield
        finally:
            await undisturbed(self._release(name))

    async def _release(self, name: str) -> None:
        try:
            await lock.release(self.vm.monitor, name)
        except DisconnectedError:
            lock.abandon(self.run_id)  # whoever comes next undoes what is there

    async def _make(self, backups: Backups, draft: Point, names: Sequence[str]) -> None:
        job = self.job
        seen = await see(self.vm, self.disks)  # anew: what was undone is gone
        job.decisions = await decided(backups, seen, self.kind)
        job.warnings = fallen_back(job.decisions)
        half = goes_back_by_half(await self.vm.graph(), [disk.device for disk in self.disks])
        if half is not None:
            self._warn(half)
        targets = {disk: backups.place(name) for disk, name in zip(self.disks, names, strict=True)}
        await check_copies(self.vm, backups.path, targets, self.words)
        bitmaps = [backup_bitmap(draft.backups, draft.id, n) for n in range(len(self.disks))]
        try:
            await self._say(backups, draft, bitmaps)
            stored = await self._bitmaps(bitmaps)
            done, moment = await self._copy(targets)
            draft = replace(draft, time=moment)
            point = await self._point(backups, draft, names, done, bitmaps, stored)
            backups.make(point)
        except BaseException as error:
            await undisturbed(self._take_back(error))
            raise
        self.made = point, done
        await undisturbed(self._end(draft.when))

    async def _say(self, backups: Backups, draft: Point, bitmaps: Sequence[str]) -> None:
        """Say what is about to be made in the VM, so that whoever finds it can undo it."""
        devices = [disk.device for disk in self.disks]
        device, inode = backups.identity()
        self.note = BackupNote(
            directory=backups.path,
            device=device,
            inode=inode,
            point=point_file(draft.when),
            made=tuple(
                (one.chain.active.node.name, name)
                for one, bitmap in zip(devices, bitmaps, strict=True)
                for name in (bitmap, end_bitmap(bitmap), open_bitmap(bitmap))
            ),
            before=others_there(devices, draft.backups, bitmaps),
            nodes=drawing_nodes(self.run_id, len(devices)),
        )
        me = Holder.me(self.run_id, **plain(self.note))
        await lock.update(self.vm.monitor, backup_lock_name(draft.backups), me)

    async def _bitmaps(self, bitmaps: Sequence[str]) -> list[bool]:
        return await make_bitmaps(
            self.vm, [disk.device for disk in self.disks], bitmaps, self.run_id
        )

    async def _copy(self, targets: dict[MappedDisk, str]) -> tuple[CopyResult, str]:
        """Copy the disks; return also of which moment that is."""
        since = {
            disk: Since((one.bitmap, end_bitmap(one.bitmap)), one.parent.file)
            for disk, one in zip(self.disks, self.job.decisions, strict=True)
            if one.parent is not None
        }
        made = copy(self.vm, targets, since=since, kept=False, format="qcow2", **self.words)
        async with made as copying:
            moment = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.job.copying = copying
            self.job.warnings += copying.warnings
            self.begun.set()
            await self._show(copying)
        done = copying.result
        assert done is not None  # leaving without an error sets it
        self.job.warnings += done.warnings[len(copying.warnings) :]
        return done, moment

    async def _show(self, copying: CopyJob) -> None:
        async for seen in copying:
            self.job.show(seen)

    async def _point(
        self,
        backups: Backups,
        draft: Point,
        names: Sequence[str],
        done: CopyResult,
        bitmaps: Sequence[str],
        stored: Sequence[bool],
    ) -> Point:
        """Say what was made, image by image, and take their digests."""
        states = [backups.files.status(name) for name in names]
        lengths = [0 if state is None else state.st_size for state in states]
        graph = await self.vm.graph()
        meter, read = Meter("digesting", sum(lengths), self.job.show), 0

        def tell(more: int) -> None:
            nonlocal read
            read += more
            meter.set(read)

        for decision, disk in zip(self.job.decisions, self.disks, strict=True):
            if decision.parent is not None and not vouched(graph, disk.device, decision.bitmap):
                raise Error(
                    f"{printable(disk.name)} was made smaller while it was backed up, or somebody "
                    "took a snapshot of it, so its dirty bitmap does not tell all that was written",
                    standing=NO_BACKUP,
                    remedy="make the backup again: of that disk it will be full",
                )
        backed_up = []
        every = zip(self.job.decisions, self.disks, names, done.disks, bitmaps, stored, strict=True)
        for decision, disk, name, copied, bitmap, keeps in every:
            fd = backups.open(name)
            try:
                digest, status = await digest_of(fd, tell), os.fstat(fd)
            finally:
                os.close(fd)
            there = survived(graph, disk.device, bitmap)
            if not there and copied.size:
                self._warn(
                    f"somebody changed {disk.name} while it was backed up: its dirty bitmap is not "
                    "where it writes now, and its next backup will be full"
                )
            backed_up.append(
                DiskBackup(
                    disk=disk.name,
                    path=disk.device.qom_path,
                    size=copied.size,
                    source=copied.source,
                    format=disk.device.chain.active.format,
                    file=name,
                    parent=None if decision.parent is None else decision.parent.file,
                    reason=decision.reason,
                    length=status.st_size,
                    modified=status.st_mtime_ns,
                    digest=digest,
                    copied=copied.copied,
                    encrypted=any(one.node.encrypted for one in disk.device.chain.layers),
                    bitmap=bitmap if there else "",
                    persistent=there and keeps,
                    lower=decision.disk.lower,
                )
            )
        return replace(draft, disks=tuple(backed_up))

    def _warn(self, words: str) -> None:
        self.job.warnings = (*self.job.warnings, words)

    async def _end(self, when: str) -> None:
        """Remove what the backup replaces."""
        assert self.note is not None  # it was said
        try:
            await delete_bitmaps(self.vm, self.note.before)
        except Error as error:
            error.standing = f"the backup {when} is made; bitmaps of the one before are still there"
            raise

    async def _take_back(self, why: BaseException) -> None:
        """Undo what was done in the VM: there is no backup."""
        if self.note is None or isinstance(why, DisconnectedError):
            return  # QEMU has ended, or whoever comes next does it
        for node in self.note.nodes:
            await tolerate(no_node, self.vm.monitor.execute("blockdev-del", {"node-name": node}))
        await delete_bitmaps(self.vm, self.note.made)
