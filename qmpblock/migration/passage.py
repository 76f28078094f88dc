"""Passage: all that one migration makes, in which phase it is, and what it came to."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.changes.change import Change
from qmpblock.changes.copies import Migration
from qmpblock.changes.identity import identify
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    DisconnectedError,
    Error,
    StalledError,
    shell_words,
)
from qmpblock.host.imagefiles import images_of
from qmpblock.migration.actives import Actives
from qmpblock.migration.bitmaps import Bitmaps
from qmpblock.migration.hold import Hold
from qmpblock.migration.imagedaemon import ImageDaemon
from qmpblock.migration.imageserver import image_server
from qmpblock.migration.job import MigratedDisk, MigrationJob, MigrationResult
from qmpblock.migration.landing import Landing
from qmpblock.migration.pause import Pause
from qmpblock.migration.settings import (
    THERE,
    Preset,
    check_channels,
    wanted_at_destination,
    wanted_at_source,
)
from qmpblock.migration.sights import has_ended
from qmpblock.migration.states import Phase
from qmpblock.migration.storage import Storage, check_can_block
from qmpblock.migration.stream import Stream
from qmpblock.migration.unchanged import Unchanged
from qmpblock.names import (
    lock_names,
    new_run,
    paused_node,
    stopped_node,
    stream_wire,
    wire_credentials,
)

if TYPE_CHECKING:
    from qmpblock.migration.look import Plan
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.migration.over import Over
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.job import Progress

__all__ = ["HANDED", "Passage"]

HANDED = "the guest belongs to the destination now; never continue the source"
"""What stands once it does."""

_ENDING = 2.0  # seconds from QEMU's last word to the end of its process
_LOOK = 0.02

_log = logging.getLogger(__name__)


class Passage:
    """One migration: what there is of it. What is done with it is told elsewhere.

    `qmpblock.migration.outward` has the guest go over, `qmpblock.migration.homeward` has it stay.

    :ivar settled: whether nothing is left to recover.
    :ivar stopped: whether the guest had stopped, by itself or somebody else: it stays so, wherever
        it ends.
    :ivar shows: in which run state it is at the destination, once it is there.
    :ivar downtime: seconds for which the guest stood; 0: not known.
    :ivar warnings: what is worth acting on.
    """

    def __init__(
        self,
        source: Connection,
        destination: Connection,
        plan: Plan,
        job: MigrationJob,
        record: Migration,
        storage: Storage,
        hold: Hold,
        means: MigrationMeans,
        preset: Preset,
        arriving: Preset | None,
        images: ImageDaemon | None,
        over: Over | None,
    ) -> None:
        self.source = source
        self.plan = plan
        self.job = job
        self.record = record
        self.change = Change(source, record, journaled=False)
        self.hold = hold
        self.settled = False
        self.stopped = False
        self.shows = "running"
        self.storage = storage
        self.means = means
        self.images = images
        self.stream = Stream(
            source, record.run, preset, self._show, job.course, over, means.multifd
        )
        storage.rest_while(lambda: self.stream.stands)
        self.landing = Landing(
            destination,
            record.run,
            plan.arriving,
            lambda: has_ended(hold.record, hold.record.destination),
            images,
            over,
            arriving,
        )
        self.pause = Pause(source, record.run, means, job)
        self.bitmaps = Bitmaps(source, destination, record.run, plan.pairs)
        self.actives = Actives(source)
        self.unchanged = Unchanged(source, destination)
        self.downtime = 0.0
        self.warnings = list(job.warnings)

    @classmethod
    async def of(
        cls,
        source: Connection,
        destination: Connection,
        plan: Plan,
        job: MigrationJob,
        means: MigrationMeans,
        *,
        speed: int,
        storage_daemon: bool,
        over: Over | None,
    ) -> Passage:
        """Say what it will make; make nothing.

        :param storage_daemon: whether one is to have the destination's images; it may without.
        :raise UnsupportedError: it cannot have the destination's images.
        """
        check_channels(means, source.capabilities)
        kept = plan.kept
        run = new_run() if kept is None else kept.record.run
        secured = over is not None and over.here is not None
        tls = None
        if over is not None:
            credentials = wire_credentials(stream_wire(run)) if secured else ""
            tls = {"tls-creds": credentials, "tls-hostname": over.hostname or ""}
        preset = await Preset.of(source.monitor, wanted_at_source(means, speed, tls))

        def show(seen: Progress) -> None:
            if job.phase is Phase.MIRRORING:
                job.show(replace(seen, status=job.phase.value))

        again = kept is not None
        storage = Storage(source, run, plan.copied, speed, show, job.course, over, again=again)
        if means.write_blocking_after and plan.copied:
            await check_can_block(source)
            storage.patience = means.write_blocking_after
        chains = [device.chain for device in plan.disks]
        record = Migration(
            run=run,
            vm=await identify(source),
            devices=tuple(device.qom_path for device in plan.disks),
            names=tuple(device.name for device in plan.disks),
            locks=lock_names(plan.disks),
            helpers=storage.jobs,
            nodes=(
                *filter(None, storage.shields),
                *(node for node, _ in storage.wires),
                *((paused_node(run),) if means.pause_after else ()),
                stopped_node(run),
            ),
            wires=(*storage.wires, *(((stream_wire(run), ""),) if secured else ())),
            images=images_of(source.monitor.peer_pid, chains),
        )
        there = None
        if means.multifd:
            told = wanted_at_destination(means)
            there = await Preset.of(destination.monitor, told, THERE)
        hold = await Hold.of(
            source, destination, run, preset.had, *(() if there is None else (there.had,))
        )
        arriving = [pair.destination for pair in plan.copied]
        images, why = None, ""
        if over is None:  # which is to the destination itself
            wanted = storage_daemon or again
            images, why = await image_server(destination, run, arriving, wanted=wanted)
        if why:
            job.warnings = (*job.warnings, why)
        return cls(
            source,
            destination,
            plan,
            job,
            record,
            storage,
            hold,
            means,
            preset,
            there,
            images,
            over,
        )

    async def begin(self) -> None:
        """Take the disks in hand: anew, or what an attempt before left of them.

        :raise Error: see `qmpblock.changes.change.Change.begin`.
        """
        kept = self.plan.kept
        if kept is None:
            await self.change.begin()
            return
        if not await self.change.adopt(kept.holder, None):
            raise BusyError(
                "the mirrors that an attempt before had left are somebody else's by now",
                standing=UNTOUCHED,
                remedy="try again",
            )
        self.job.say("the disks' mirrors of an attempt before are gone on with")

    @property
    def may_keep(self) -> bool:
        """Whether what is copied may be kept: by a storage daemon, and that is well."""
        copied = self.plan.copied
        plain = all(not pair.top and pair.allocation == "thin" for pair in copied)
        return self.images is not None and plain and self.storage.well

    async def keep(self) -> bool:
        """Leave the mirrors for another attempt, if that can be; return whether they are left.

        The storage daemon has ended then; if it cannot, all is as it was, but for that.

        :raise StalledError: the daemon does not end.
        """
        if self.images is None or not await self.storage.keep():
            return False
        await self.images.flush()
        await self.images.end()
        marks = self.images.marks() if self.images.whole else ()
        if not marks:
            return False
        self.storage.leave()
        await self.change.leave(kept=marks)
        return True

    async def enter(self, phase: Phase, *, beside: bool = False) -> None:
        """Say that a phase begins, before what it stands for is done.

        :param beside: or while it is: by a thread, then.
        """
        if beside:
            await asyncio.to_thread(self.hold.enter, phase, stopped=self.stopped)
        else:
            self.hold.enter(phase, stopped=self.stopped)
        self.job.enter(phase)

    def _show(self, seen: Progress) -> None:
        self.job.show(replace(seen, status=self.job.phase.value))

    async def source_has_ended_standing(self) -> bool:
        """Whether it is gone, and its guest had not gone on there: then that one's disks count."""
        return await self.source_has_ended() and not self.stream.went_on

    async def source_has_ended(self) -> bool:
        """Whether the source's very process is certainly gone."""
        said = self.hold.record
        deadline = time.monotonic() + _ENDING
        while not has_ended(said, said.source):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_LOOK)
        return True

    # -- at last

    def say(self, *, ended: bool) -> None:
        """Tell in the job's result what it came to, now that the guest has gone over.

        :param ended: whether the source's QEMU has.
        """
        course, now = self.job.course, time.monotonic()
        self.job.result = MigrationResult(
            disks=tuple(
                MigratedDisk(
                    pair.source.name,
                    pair.source.chain.active.file,
                    pair.destination.chain.active.file,
                    pair.source.chain.root.size,
                    copied,
                    course.mirror(mirror),
                    "top" if pair.top else "all",
                    pair.allocation,
                )
                for pair, copied, mirror in zip(
                    self.plan.copied, self.storage.copied, self.storage.jobs, strict=True
                )
            ),
            seconds=course.since(now),
            downtime=self.downtime,
            qemu_downtime=self.stream.downtime,
            longest_stall=course.longest_stall,
            stopped=course.stopped,
            resumed=course.resumed,
            transferred=self.stream.transferred,
            bitmaps=self.bitmaps.moved,
            phases=course.phases(now),
            passes=course.passes(),
            source="ended" if ended else "postmigrate",
            destination=self.shows,
            warnings=tuple(self.warnings),
            notices=self.job.notices,
            paused=course.stood_before if self.pause.stands else 0.0,
        )

    def say_handed(self, error: Error) -> None:
        """Say what stands where something failed when the guest was the destination's by then."""
        if error.standing is not None and not isinstance(error, DisconnectedError | StalledError):
            return  # of those nothing is said but that an outcome is unknown
        error.standing = HANDED
        both = shell_words([self.source.monitor.address, self.landing.vm.monitor.address])
        error.remedy = (
            "look whether it runs, else continue it (cont); if its QEMU has ended, start the guest "
            "from its images"
            if self.settled
            else "have the destination answer, or see that its QEMU has ended; then, for the guest "
            f"may stand there, run: qmpblock recover {both}"
        )

    async def close(self) -> None:
        """Let go of all that this process holds; what is left to be recovered stays so."""
        self.stream.close()
        self.unchanged.close()
        try:
            await self.storage.close()
        except Error as error:
            _log.debug("a wire did not end well: %s", error)  # what that means was said by then
        await self.hold.let_go(settled=self.settled)
