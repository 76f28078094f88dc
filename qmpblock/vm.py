"""What users hold: `connect`, a `VM`, and each `Disk` of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack

from qmpblock.address import MonitorAddress
from qmpblock.copying.options import names_copy_options
from qmpblock.errors import MonitorHeldError, NotFoundError
from qmpblock.graph.model import JobInfo
from qmpblock.mapping import MappedDisk
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.qemu.elsewhere import check_served_here

if TYPE_CHECKING:
    import os
    from contextlib import AbstractAsyncContextManager

    from qmpblock.allocation.allocate import AllocationResult
    from qmpblock.allocation.room import RoomResult
    from qmpblock.allocation.thin import Allocator
    from qmpblock.backups.decision import Kind
    from qmpblock.backups.job import BackupJob
    from qmpblock.backups.planned import PlannedBackup
    from qmpblock.chains.jobs import ChainJob
    from qmpblock.chains.snapshot import SnapshotResult
    from qmpblock.changes.step import Step
    from qmpblock.copying.job import CopyJob
    from qmpblock.copying.options import CopyWords
    from qmpblock.copying.planned import PlannedCopy
    from qmpblock.copying.pointintime import PointInTime
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.job import Progress
    from qmpblock.recovery import Recovery
    from qmpblock.speed import Speed

__all__ = ["VM", "Disk", "connect"]

DiskT = TypeVar("DiskT", bound=MappedDisk)


@asynccontextmanager
async def connect(
    address: str | MonitorAddress,
    *,
    nbd: str | None = None,
    tls_creds: str | None = None,
    insecure: bool = False,
    unmanaged: bool = False,
    greeting_timeout: float = 5.0,
    stall: float = 60.0,
) -> AsyncIterator[VM]:
    """Connect to a running QEMU; leaving disconnects, and changes nothing in it.

    :param address: of its QMP monitor: a UNIX socket path, HOST:PORT, or, on another host,
        ssh://[USER@]HOST[:PORT]/PATH.
    :param nbd: address of a foreign NBD server that already listens in this VM.
    :param tls_creds: directory of TLS credentials for NBD over TCP (QEMU's x509 layout).
    :param insecure: allow NBD over TCP without TLS.
    :param unmanaged: change chains also where libvirt or another manager owns them, and will not
        know of it (docs/safety.md).
    :param greeting_timeout: seconds for the monitor's greeting.
    :param stall: seconds without progress that count as a failure.
    :raise MonitorError: the monitor cannot be reached or used; a MonitorHeldError says which
        process holds it, and what it is about where it is one of ours.
    :raise UnsupportedError: QEMU older than 7.2.
    """
    access = NBDAccess(nbd, tls_creds, insecure)
    opened = VM.open(
        address, access, unmanaged=unmanaged, greeting_timeout=greeting_timeout, stall=stall
    )
    async with AsyncExitStack() as stack:
        try:
            vm = await stack.enter_async_context(opened)
        except MonitorHeldError as error:
            from qmpblock.changes.held import tell_of_our_own

            tell_of_our_own(error, address)
            raise
        yield vm


class VM(Connection):
    """One running QEMU. Get it from `connect`."""

    async def disks(self) -> list[Disk]:
        """Return every guest device that has a disk in it."""
        graph = await self.graph()
        return [Disk(self, device) for device in graph.disks()]

    async def disk(self, name: str) -> Disk:
        """Find a disk by qdev id, QOM path, drive id, node name or active image file.

        By its manager's name of it, too: `vda` where libvirt lends the monitor, `root` of Incus,
        `efidisk0` of Proxmox VE.

        :raise NotFoundError: there is none; the error lists those that there are.
        :raise UnsupportedError: another process serves it (vhost-user).
        :raise AmbiguousError: more than one goes by that name.
        """
        graph = await self.graph()
        try:
            return Disk(self, graph.device(name))
        except NotFoundError:
            called = await self.disks_called(graph)
            if name not in called:
                await check_served_here(self.monitor, name)
            if not called:
                raise
        return Disk(self, graph.device(name, called))

    async def jobs(self) -> tuple[JobInfo, ...]:
        """Return every background job, of whomever; `job.ours` says whose it is."""
        return (await self.graph()).jobs

    async def snapshot(
        self,
        overlays: Mapping[Disk, str | os.PathLike[str]],
        *,
        format: str = "qcow2",  # noqa: A002 - the command's word
        backing_name: Literal["relative", "absolute"] = "relative",
    ) -> SnapshotResult:
        """Freeze the active layers of several disks at one point in time.

        Each disk's writes go to its overlay from then on, a new file which is named here and
        made by QEMU, with the disk's encryption if it has one. Dirty bitmaps that record in
        the active layer go on, under the same names, in the overlay. All or none; cancelled
        or failed, nothing is left.

        :param overlays: for each disk the path of its overlay; relative ones count from the
            current directory.
        :param format: of the overlays: qcow2 or qed.
        :param backing_name: how an overlay records the image below: relative to its own
            directory, or absolute.
        :raise RequestError: a file is there already, or it is not possible; nothing was touched.
        :raise BusyError: a job, or another controller, is at work on one of the disks.
        """
        from qmpblock.chains.snapshot import snapshot

        return await snapshot(self, overlays, format=format, backing_name=backing_name)

    @asynccontextmanager
    async def point_in_time(
        self,
        disks: Sequence[DiskT],
        *,
        fleece: str | os.PathLike[str] | None = None,
        fleece_limit: int | None = None,
    ) -> AsyncIterator[dict[DiskT, PointInTime]]:
        """Export disks as they are at one instant, for anybody's NBD client; the guest goes on.

        `async with vm.point_in_time([disk]) as points:` and `points[disk].uri` is a read-only NBD
        export of the disk as it was when this was entered, at a UNIX socket to which only this user
        can connect. Of several disks it is one instant, for which the VM is paused: milliseconds,
        or as long as requests of the guest's that are in flight take to end. For one it is not.
        Before QEMU 10.0 the export tells no block status: all is data.

        What the guest overwrites meanwhile is kept in a file for each disk, which goes at the end.
        Where it cannot be kept (the file is full, its storage fails or does not answer for five
        seconds, for which a write of the guest's may wait once) the point has ended, and not the
        write: from then on every read of that export fails.

        Leaving, by whatever way, ends it: connections are closed, and no reader is waited for.
        Meanwhile nobody of ours changes these disks, the VM does not migrate, and maps and other
        exports of ours in this VM wait for its end, up to their stall limit; so do those of this
        very `VM`.

        :param fleece: the directory of what is kept; by default beside each disk's active image.
        :param fleece_limit: bytes that it may have, for each disk; by default half of what is free
            there when this is entered, shared by the disks.
        :raise RequestError: no disk, or one twice, or a limit below some MiB; nothing was touched.
        :raise UnsupportedError: this QEMU cannot safely (a disk in an iothread before 10.0), or the
            place or the monitor does not allow it; nothing was touched.
        :raise NoRoomError: there is no room there; nothing was touched.
        :raise BusyError: a job, or another controller, is at work on one of the disks, or a foreign
            NBD server runs in the VM.
        """
        from qmpblock.copying.fleecing import Fleece
        from qmpblock.copying.pointintime import point_in_time

        async with point_in_time(self, disks, Fleece(fleece, fleece_limit)) as points:
            yield points

    @names_copy_options
    def copy(
        self,
        targets: Mapping[Disk, str | os.PathLike[str]],
        **options: Unpack[CopyWords],
    ) -> AbstractAsyncContextManager[CopyJob]:
        """Copy running disks, all at one instant, while the guest goes on.

        `async with vm.copy({disk: "/srv/copy.qcow2"}) as job:`; leaving it waits for the end.
        Iterating over `job` yields its progress, of all disks together; `job.result` says what was
        made. The guest is never in a target's way: one that is full, slow or gone fails the copy.

        The copy is of the instant in which it is entered (`at="start"`), or of that in which it is
        left, or of `await job.complete()` (`at="end"`, `pivot`). For the start, what the guest
        overwrites meanwhile is kept beside its images, as for `point_in_time`; on QEMU before 10.0
        what it writes goes to an overlay there, which comes home at the end, so that after a crash
        `recover IMAGE` has to run before the VM is started again. For the end the
        guest's I/O is held for some milliseconds, for two seconds at most: where the disks cannot
        be brought to one instant by then, all go on, and it is tried again.

        A target bears the name TARGET.partial until all of it is on stable storage. With `pivot` it
        has its own name at once, the guest goes on in it, and what was active is stale; of several
        disks all go over or none, whoever dies. Cancelled or failed, there is no copy, the guest is
        where it was, and nothing is left; but TARGET.partial where something had been copied, and
        not for want of room (`CopyJob.kept`): `resume` goes on from it.

        :param targets: for each disk the path of its copy, of a new file or of a block device, or
            an NBD URI; relative paths count from the current directory. An encrypted disk's copy is
            encrypted with the same secret object.
        :param pivot: have the guest go over to the copies at the end; filters above them stay.
        :param format: of the copies: `qcow2` or `raw`; None: what the active layer is, if one of
            them, else qcow2.
        :param layers: `all` of a chain, or the `top`: then the copy lies on the same backing image.
        :param allocation: what of the copies has host space: `thin`, what they hold but for zeros;
            `full`, every byte, before anything is copied; `like`, what the disk has host space for
            when the copy begins, and what it holds.
        :param cluster_size: bytes of a cluster of qcow2 copies; None: 64 KiB.
        :param compress: what qcow2 copies of the start hold.
        :param direct: write files and block devices past the host's page cache.
        :param reflink: have copies of the start share the blocks of the disks' files, on a file
            system that can; it is refused where they cannot, and warned of where they do not.
        :param force: replace files of those names, once the copies are whole, never with `pivot`;
            overwrite block devices.
        :param speed: bytes a second at most, of all disks; 0 is no limit.
        :param fleece: the directory of what is kept, of the start; by default beside each image.
        :param fleece_limit: bytes that it may have, for each disk; by default half of what is free.
        :param verify: compare each copy, byte for byte, with the point that it is of, before that
            is given up; only of the start, and of files.
        :param tls_creds: on QEMU's host, the directory of the credentials for `nbds` targets, laid
            out as for QEMU's tls-creds-x509, or with a file `keys.psk` as for tls-creds-psk.
        :param latency: seconds that the guest's reads and writes may take, on the worst of the
            disks: 99 of 100 where QEMU has latency histograms that tell of it, else on average. The
            copy goes as fast as leaves them that, within `speed`, but never slower than a MiB a
            second; 0 is no limit. `job.progress` has what it is.
        :param resume: go on from TARGET.partial where there is one, or from whatever a block device
            or a server holds: it is compared with the disk as it is now, and what it has not, or
            has otherwise, is copied. Of the end, and with `pivot`, the VM is paused for the last
            of that, for two seconds at most, before what the guest writes is followed.
        :raise RequestError: a file is there already, or it is not possible; nothing was touched.
        :raise UnsupportedError: this QEMU cannot do it safely, or the target cannot be so, or has
            not the room for what is to be reserved; nothing was touched.
        :raise BusyError: a job, or another controller, is at work on one of the disks.
        :raise JobError: on leaving: a target failed, or the guest's image did.
        :raise StalledError: on leaving: a job did not move, or the guest outran it.
        """
        from qmpblock.copying.copy import copy

        return copy(self, targets, **options)

    @names_copy_options
    async def plan_copy(
        self,
        targets: Mapping[Disk, str | os.PathLike[str]],
        **options: Unpack[CopyWords],
    ) -> PlannedCopy:
        """Say how `copy` would go about these disks, and what it takes; make none.

        Which way it takes on this QEMU and why, what the guest feels, the bytes to read and to
        write by the disks' maps, the room that is needed and there, and the time at the speed that
        is asked for. What `copy` would refuse is refused, by the same errors; so is a disk on which
        a controller that died left something, which `copy` undoes first.

        Nothing is made. The maps need an export for a moment each, as `Disk.map`; where there can
        be none the bytes are None, with a warning. A server of NBD is not asked: many serve one
        client, and end.

        :param options: as of `copy`.
        :raise Error: as of `copy`, before it touches anything.
        """
        from qmpblock.copying.dryrun import dry_run

        return await dry_run(self, targets, **options)

    def backup(
        self,
        directory: str | os.PathLike[str],
        disks: Sequence[Disk],
        *,
        kind: Kind | None = None,
        compress: bool = False,
        speed: int = 0,
        latency: float = 0.0,
        fleece: str | os.PathLike[str] | None = None,
        fleece_limit: int | None = None,
        verify: bool = False,
    ) -> AbstractAsyncContextManager[BackupJob]:
        """Back up running disks into a directory, all at one instant, while the guest goes on.

        `async with vm.backup("/srv/backups/web", await vm.disks()) as job:`; leaving it waits for
        the end. Iterating over `job` yields its progress, of all disks together; `job.decisions`
        says which backups are incremental, and why others are not, `job.result` what was made.

        The backup is of the instant in which this is entered, as a `copy` of the start is, by the
        same means and with the same bounds for the guest. Each disk becomes a qcow2 image in the
        directory; that of an increment lies on the one before. It is made once its point file
        (WHEN.json) is there, which is after all of it is on stable storage. In each disk's active
        layer dirty bitmaps stay, called qmpblock-backup-..., by which the next backup can be an
        increment. Cancelled or failed, there is no backup, those before count, and the next one
        can be what this one was to be. Cancelled once it is made, what was left to be done is done,
        and `job.result` says what was made.

        :param directory: of the backups of this VM alone; it is made if it is not there.
        :param disks: which.
        :param kind: `full` or `incremental`; None: incremental where it can be, else full, of which
            `job.warnings` tells where an increment was to be expected.
        :param compress: what the images hold.
        :param speed: bytes a second at most, of all disks; 0 is no limit.
        :param latency: as of `copy`; so are `fleece`, `fleece_limit` and `verify`.
        :raise RequestError: the directory holds other things, or another VM's backups; or an
            increment is asked for and cannot be; nothing was touched.
        :raise UnsupportedError: as of `copy`.
        :raise BusyError: another backup is being made there; or as of `copy`.
        :raise RecordError: a point file in the directory cannot be read.
        :raise JobError: on leaving: the directory's storage failed, or the guest's image did.
        """
        from qmpblock.backups.run import backup

        return backup(
            self,
            directory,
            disks,
            kind,
            compress=compress,
            speed=speed,
            latency=latency,
            fleece=fleece,
            fleece_limit=fleece_limit,
            verify=verify,
        )

    async def plan_backup(
        self,
        directory: str | os.PathLike[str],
        disks: Sequence[Disk],
        *,
        kind: Kind | None = None,
        compress: bool = False,
        speed: int = 0,
        latency: float = 0.0,
        fleece: str | os.PathLike[str] | None = None,
        fleece_limit: int | None = None,
        verify: bool = False,
    ) -> PlannedBackup:
        """Say what `backup` would make of these disks, and what it takes; make none.

        Of each disk whether its image would be full or an increment, why and on what, how many
        bytes there are to copy at the most, and the room; how it is made on this QEMU, what the
        guest feels, the time at the speed that is asked for. What `backup` would refuse is refused,
        by the same errors; so is a disk on which a controller that died left something, which
        `backup` undoes first.

        Nothing is made, neither in the VM nor in the directory, nor is that. The map of a disk of
        which all would be copied needs an export for a moment, as `Disk.map`; where there can be
        none the bytes are None, with a warning.

        :param directory: as of `backup`, and so are all options.
        :raise Error: as of `backup`, before it touches anything.
        """
        from qmpblock.backups.dryrun import dry_run

        return await dry_run(
            self,
            directory,
            disks,
            kind,
            compress=compress,
            speed=speed,
            latency=latency,
            fleece=fleece,
            fleece_limit=fleece_limit,
            verify=verify,
        )

    async def recover(
        self,
        *,
        carry_on: bool = False,
        dry_run: bool = False,
        tell: Callable[[str, Step], None] | None = None,
        progress: Callable[[str, Progress], None] | None = None,
    ) -> list[Recovery]:
        """Undo, or carry on, what controllers that died left in this VM. Idempotent.

        A pivot that waits to be finalized is finished before anything else: it holds the
        guest's I/O. What living controllers do is never touched, only listed.

        :param carry_on: follow jobs to their end instead of cancelling them.
        :param dry_run: only say what is to be done.
        :param tell: is called before each step, with what it belongs to.
        :param progress: is told how far each job is that is carried on, with what it is.
        :raise BusyError: of some controller it cannot be told whether it lives; all else is
            recovered.
        :raise GraphError: the manager that lends the monitor takes another image for the active one
            than the guest writes to, and would start it from there; what to do.
        """
        from qmpblock.changes.step import Choice
        from qmpblock.recovery import recover

        choice = Choice.CONTINUE if carry_on else Choice.UNDO
        return await recover(self, choice, dry_run=dry_run, tell=tell, progress=progress)


class Disk(MappedDisk):
    """One guest disk of a `VM`. Get it from `VM.disk` or `VM.disks`.

    Its attributes say what was true when it was looked up; its methods look again.
    """

    vm: VM

    def __init__(self, vm: VM, device: DiskDevice) -> None:
        super().__init__(vm, device)

    async def allocate(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        full: bool = False,
        independent: bool = False,
        speed: Speed | int = 0,
        progress: Callable[[Progress], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> AllocationResult:
        """Make a range stand in the active layer of the running disk, its content unchanged.

        What a layer below holds comes up; what no layer holds stays blank. The guest is never
        paused, no write can be lost, and the map is read at the end: what is still below is an
        error. Cancelled, what was done by then stays, since it changes no content.

        :param offset: rounded outwards to clusters, as is the end; the result says so.
        :param length: in bytes; by default up to the disk's end.
        :param full: what no layer holds, and mere zeros, get host space too: by fallocate on
            raw, LUKS and raw data files, by staged commits on qcow2 and QED, whose pivots hold
            the guest's I/O for milliseconds (`result.held`). QEMU dying in one of those needs
            `qmpblock recover IMAGE` before the image is started again.
        :param independent: afterwards nothing depends on the backing chain any more, and the
            link to it is dropped. For the whole disk only.
        :param speed: bytes a second; a `Speed` can be changed meanwhile.
        :param progress: is called with how far it is.
        :param warn: is called with each of `result.warnings` as soon as it is known: that
            dirty bitmaps will grow, and by how much, before the guest's disk is touched.
        :raise RangeError: the range is not inside the disk.
        :raise UnsupportedError: this format, or place, cannot; nothing was touched.
        :raise BusyError: another controller is at work on the disk.
        :raise GraphError: somebody changed the chain meanwhile; it says what was done.
        """
        from qmpblock.allocation.allocate import allocate
        from qmpblock.speed import Speed

        return await allocate(
            self,
            offset,
            length,
            full=full,
            independent=independent,
            speed=speed if isinstance(speed, Speed) else Speed(speed),
            progress=progress,
            warn=warn,
        )

    @names_copy_options
    def copy(
        self,
        target: str | os.PathLike[str],
        **options: Unpack[CopyWords],
    ) -> AbstractAsyncContextManager[CopyJob]:
        """Copy this disk, while the guest goes on. See `VM.copy`."""
        return self.vm.copy({self: target}, **options)

    @names_copy_options
    async def plan_copy(
        self, target: str | os.PathLike[str], **options: Unpack[CopyWords]
    ) -> PlannedCopy:
        """Say how `copy` would go about this disk, and what it takes. See `VM.plan_copy`."""
        return await self.vm.plan_copy({self: target}, **options)

    def allocator(self) -> AbstractAsyncContextManager[Allocator]:
        """Allocate many ranges, thin, one after another, for what one costs.

        `async with disk.allocator() as a: await a.allocate(offset, length)`: as `allocate`, but
        what each call would set up and take down is kept: the disk's lock and the export, through
        which each range's map is read as it is now, before and after. So a range takes a
        millisecond, not 25. Nothing that the guest writes meanwhile can be lost.

        Full allocation is not for this: it freezes the disk for a moment, so `allocate` does as
        many ranges in one go as it is given. While it is open, other maps of the VM wait, and
        nobody else of ours changes the disk: hold it no longer than it is used.

        A snapshot that somebody takes meanwhile is noticed within a fifth of a second, and at the
        latest when this is left; what was returned in that time may have gone to the overlay.
        Cancelled or failed, what was allocated by then stays, since it changes no content.

        :raise UnsupportedError: this format, or place, cannot; nothing was touched.
        :raise BusyError: another controller is at work on the disk, or on the VM's NBD server.
        :raise GraphError: on leaving: the active layer is another one now.
        """
        from qmpblock.allocation.thin import open_allocator

        return open_allocator(self)

    async def make_room(self, size: int, *, keep_free: int = 0) -> RoomResult:
        """Reserve host space for the next `size` bytes that the guest writes, once.

        So a host that runs full later does not fail them. Where the active layer grows at its
        end (qcow2, QED, ...) the space lies past the end of its file, and holds data and
        metadata alike; where it stores data as it is (raw, LUKS, a data file), it is the lowest
        blank ranges of the disk. By fallocate(2): the guest is not paused, no content and no
        size changes. Idempotent: what is missing of it is reserved. Cancelling leaves what is
        reserved by then.

        :param size: bytes; rounded up to 64 KiB.
        :param keep_free: bytes of the host's file system that are to stay free.
        :raise RequestError: no bytes.
        :raise UnsupportedError: this format, file system or place cannot; nothing was touched.
        :raise Error: there is no room on the host; what was reserved by then stays.
        """
        from qmpblock.allocation.room import make_room
        from qmpblock.sizes import Amount

        return await make_room(self, size, keep_free=Amount(keep_free) if keep_free else None)

    async def keep_ahead(
        self,
        size: int,
        *,
        keep_free: int = 0,
        tell: Callable[[RoomResult], None] | None = None,
    ) -> None:
        """Keep host space reserved ahead of the guest for as long as the VM lives.

        As `make_room`, again and again: up to `size` bytes, as soon as less than half of it is
        left. QEMU wakes us by its event BLOCK_WRITE_THRESHOLD (block-set-write-threshold,
        qapi/block-core.json), which is set on the storage node of the active layer and comes
        once; a look every five seconds finds what no event tells, such as another active layer
        after a snapshot or a commit, which is followed. A temporary overlay of another operation
        of ours is left alone.

        Returns when the VM has ended. Cancelling it is the way to end it before: the threshold
        and the lock are taken away first; what is reserved stays.

        :param size: bytes; rounded up to 64 KiB. What the guest writes in some seconds, at least.
        :param keep_free: bytes of the host's file system that are to stay free.
        :param tell: is called after each reservation, and when there is no room on the host
            (`error`; it is tried again) or nothing left to reserve (`full`).
        :raise RequestError: no bytes; or the disk was unplugged.
        :raise UnsupportedError: this format, file system or place cannot, or that of a layer that
            has become the active one.
        :raise BusyError: another watcher keeps this disk's room, or somebody else has set a
            write threshold on the node, which is left as it is.
        :raise DisconnectedError: the connection was lost, but QEMU lives: `recover` removes what
            is left.
        """
        from qmpblock.allocation.watch import keep_ahead
        from qmpblock.sizes import Amount

        await keep_ahead(self, size, keep_free=Amount(keep_free) if keep_free else None, tell=tell)

    async def snapshot(
        self,
        overlay: str | os.PathLike[str],
        *,
        format: str = "qcow2",  # noqa: A002 - the command's word
        backing_name: Literal["relative", "absolute"] = "relative",
    ) -> SnapshotResult:
        """Freeze the active layer; the guest's writes go to `overlay` from then on.

        As `VM.snapshot`, for one disk.
        """
        return await self.vm.snapshot({self: overlay}, format=format, backing_name=backing_name)

    @asynccontextmanager
    async def point_in_time(
        self,
        *,
        fleece: str | os.PathLike[str] | None = None,
        fleece_limit: int | None = None,
    ) -> AsyncIterator[PointInTime]:
        """Export the disk as it is at this instant, for anybody's NBD client; the guest goes on.

        As `VM.point_in_time`, for one disk.
        """
        taking = self.vm.point_in_time([self], fleece=fleece, fleece_limit=fleece_limit)
        async with taking as points:
            yield points[self]

    def stream(
        self, *, top: str | None = None, base: str | None = None, speed: int = 0
    ) -> AbstractAsyncContextManager[ChainJob]:
        """Copy what lies between `top` and `base` into `top`; the images between are dropped.

        `async with disk.stream() as job:` starts it; leaving waits for its end. The guest
        runs on, and sees no difference. No link to an image is dropped before what came from
        it is on stable storage. Raised or cancelled inside, the job is cancelled, and the
        chain is as it was; what was copied by then stays in `top`.

        :param top: the LAYER that is written to: a node name, file name or `@N`; by default
            the active one.
        :param base: the LAYER to stop above, which stays; by default none does.
        :param speed: bytes a second; 0 is no limit. `job.set_speed` changes it.
        :raise RequestError: no such layer, wrong order, or not safely possible; nothing was
            touched.
        :raise BusyError: a job, or another controller, is at work on the disk; an InUseError:
            somebody else uses a layer that would change, or go.
        :raise JobError: QEMU's job failed; the chain is as it was.
        :raise StalledError: it did not move for the stall limit; undone.
        """
        from qmpblock.allocation.pull import stream

        return stream(self, top=top, base=base, speed=speed)

    def commit(
        self,
        *,
        top: str | None = None,
        base: str | None = None,
        speed: int = 0,
        throttle_guest: int = 0,
    ) -> AbstractAsyncContextManager[ChainJob]:
        """Copy what `top` and the layers above `base` hold into `base`; they are dropped.

        As `stream`. Where `top` is the active layer, the guest moves on to `base` at the end
        (a pivot) once `job.complete()` asked for it, which leaving the `async with` does too;
        the filters above stay. Its I/O is held for some milliseconds then; under libvirt, which
        pivots itself, the VM is paused until it knows. The VM is to be
        started from `base` afterwards: what was the active image is stale.

        `base` is written to: nobody else may depend on it. Given up, it keeps what it got,
        which changes nothing for this disk.

        :param top: the uppermost LAYER to commit; by default the active one.
        :param base: by default the lowest layer.
        :param throttle_guest: bytes a second to which the guest's I/O on this disk is limited
            for the time of the pivot, if it writes faster than the job copies; 0: never.
        :raise StalledError: also when an active commit does not converge: the guest writes
            faster than it copies for the stall limit.
        """
        from qmpblock.chains.managed import commit

        return commit(self, top=top, base=base, speed=speed, throttle_guest=throttle_guest)
