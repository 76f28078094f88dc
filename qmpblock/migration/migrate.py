"""One live migration, from its look to its last trace; and the way back from each of its phases.

::

    checked     locks at both sides; nothing has begun
    mirroring   disks are copied; they follow the guest
    ready       every disk is as far as the guest
    memory      QEMU migrates; the guest runs at the source
    held        the guest stands; QEMU waits for us
    ended       the mirrors have ended: both sides' disks are the same
    sent        no export is left; QEMU sends the rest
    landed      the source says completed, the destination has all and stands
    handed      the arbiter says "destination": the guest runs there

Until `landed` the source owns the guest, and it goes on there by itself, or is made to, whatever
fails; the destination was started with -S, so it never runs by itself. In `landed` both stand, and
the arbiter (`qmpblock.migration.arbiter`) is what decides, once. From `handed` on there is no way
back. The guest stands from `held` on, no longer than `STANDSTILL`.

The way back is not interrupted::

    a destination that does not answer: every wire is cut first (K32)
    memory ...   the stream is cut, and migrate_cancel where the guest is held for us (K35), until
                 the guest runs; of a source that says completed: the arbiter,
                 "source", then cont
    mirroring .. mirrors cancelled, the destination's exports ended (K1), nodes and locks removed
    the destination is as it was; or is ended (quit), where it was sent anything
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import undisturbed
from qmpblock.chains.plan import check_unchanged
from qmpblock.changes.change import Change
from qmpblock.changes.copies import Migration
from qmpblock.changes.identity import identify
from qmpblock.changes.nomigration import allow_migration
from qmpblock.copying.job import working
from qmpblock.copying.wire import HOLD
from qmpblock.errors import (
    CommandError,
    DisconnectedError,
    Error,
    StalledError,
    printable,
)
from qmpblock.host.imagefiles import images_of
from qmpblock.migration import arbiter, wayback
from qmpblock.migration.hold import Hold
from qmpblock.migration.job import MigratedDisk, MigrationJob, MigrationResult
from qmpblock.migration.landing import Landing
from qmpblock.migration.look import Plan, look
from qmpblock.migration.sights import has_ended
from qmpblock.migration.states import Phase, Side
from qmpblock.migration.storage import Storage
from qmpblock.migration.stream import OVER, Stream, told_at
from qmpblock.names import handover_name, lock_names, new_run

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.job import Progress

__all__ = ["STANDSTILL", "migrate"]

STANDSTILL = 10.0
"""Seconds for which the guest may stand; then it goes on at the source."""

_ENDING = 2.0  # seconds from QEMU's last word to the end of its process
_LOOK = 0.02

_log = logging.getLogger(__name__)


@asynccontextmanager
async def migrate(
    source: Connection,
    destination: Connection,
    *,
    memory_only: bool = False,
    speed: int = 0,
    quit_source: bool = False,
) -> AsyncIterator[MigrationJob]:
    """Have the guest of `source` go on in `destination`, with its disks, while it runs.

    `async with qmpblock.migrate(source, destination) as job:` begins; leaving waits for the end.
    Iterating over `job` yields its progress; `job.result` says what it came to.

    The destination is a QEMU with the same machine and devices, images of its own of the same
    sizes, and `-S -incoming defer`. Its images are overwritten. Never do both run, and the guest
    stands for tens of milliseconds, ten seconds at most: then it goes on at the source.

    Cancelled or failed before the guest is there, it goes on at the source, where nothing is left.
    A destination that was sent anything by then is ended (`quit`); else it waits as before. Once
    the guest is there a cancellation is raised when all is cleaned up, and `job.result` is set.

    :param source: a `VM`; `destination`: another. Both by UNIX monitors, on this host.
    :param memory_only: the disks are shared storage: both sides' images are the same files.
    :param speed: bytes a second at most, of all disks, and again of the memory; 0: of the disks no
        limit, of the memory what the VM's migration parameters say.
    :param quit_source: end the source's QEMU when the guest is gone; else it stays, `postmigrate`,
        with an object that says so (`qmpblock-RUN-handover`).
    :raise RequestError: the VMs are no such pair; nothing was touched.
    :raise BusyError: a job, or another controller, is at work on a disk.
    :raise JobError: a disk could not be mirrored; the guest is at the source.
    :raise StalledError: nothing moved, or the guest outran it; the guest is at the source.
    :raise Error: the migration failed, in QEMU's words; the guest is at the source, or the error
        says where.
    """
    plan = await look(source, destination, memory_only=memory_only)
    job = MigrationJob(plan.warnings)
    passage = await _Passage.of(source, destination, plan, job, speed=speed)
    began = time.monotonic()
    try:
        await passage.change.begin()
        async with (
            passage.or_back(quit_source=quit_source, began=began),
            working(passage.work(), job),
        ):
            yield job
    finally:
        job.end()


class _Passage:
    """All that one migration makes, and in which phase it is."""

    def __init__(
        self,
        source: Connection,
        destination: Connection,
        plan: Plan,
        job: MigrationJob,
        record: Migration,
        storage: Storage,
        hold: Hold,
        speed: int,
    ) -> None:
        self.source = source
        self.plan = plan
        self.job = job
        self.record = record
        self.change = Change(source, record, journaled=False)
        self.hold = hold
        self._settled = False  # whether nothing is left to recover
        self.storage = storage
        self.stream = Stream(source, record.run, speed, self._show, job.course)
        self.landing = Landing(
            destination,
            record.run,
            plan.arriving,
            lambda: has_ended(hold.record, hold.record.destination),
        )
        self.downtime = 0.0
        self._warnings = list(plan.warnings)

    @classmethod
    async def of(
        cls,
        source: Connection,
        destination: Connection,
        plan: Plan,
        job: MigrationJob,
        *,
        speed: int,
    ) -> _Passage:
        """Say what it will make; make nothing."""
        run = new_run()

        def show(seen: Progress) -> None:
            if job.phase is Phase.MIRRORING:
                job.show(replace(seen, status=job.phase.value))

        storage = Storage(source, run, plan.copied, speed, show, job.course)
        chains = [device.chain for device in plan.disks]
        record = Migration(
            run=run,
            vm=await identify(source),
            devices=tuple(device.qom_path for device in plan.disks),
            names=tuple(device.name for device in plan.disks),
            locks=lock_names(plan.disks),
            helpers=storage.jobs,
            nodes=tuple(node for node, _ in storage.wires),
            wires=storage.wires,
            images=images_of(source.monitor.peer_pid, chains),
        )
        hold = await Hold.of(source, destination, run)
        return cls(source, destination, plan, job, record, storage, hold, speed)

    async def _enter(self, phase: Phase) -> None:
        """Say that a phase begins, before what it stands for is done."""
        self.hold.enter(phase)
        self.job.enter(phase)

    def _show(self, seen: Progress) -> None:
        self.job.show(replace(seen, status=self.job.phase.value))

    # -- the way there

    async def work(self) -> None:
        """Bring the guest there.

        Cancelling leaves it in the phase in which it is; `or_back` goes on from there.

        :raise Error: see `migrate`.
        """
        graph = await self.source.graph()
        for device in self.plan.disks:
            check_unchanged(graph, device)
        await self.hold.begin()
        await self.landing.lock(serving=len(self.plan.copied))
        if self.plan.copied:
            targets = await undisturbed(self.landing.serve(self.plan.copied))
            await self._enter(Phase.MIRRORING)
            await self.storage.start(targets)
        async with self.storage.watched():
            if self.plan.copied:
                await self.storage.until_ready()
                await self._enter(Phase.READY)
            await self.stream.prepare()
            self.storage.hurry()
            await self._enter(Phase.MEMORY)
            await allow_migration(self.source.monitor, self.record.run)
            await self.stream.start(self.landing)
            await self.stream.until_held()
        try:
            async with asyncio.timeout(STANDSTILL):
                await self._while_it_stands()
        except TimeoutError:
            raise StalledError(
                f"the guest stood for {STANDSTILL:g} s (phase {self.job.phase.value}): too long",
                remedy="look what the destination, its storage or the network waits for",
            ) from None
        await undisturbed(self._hand_over())

    async def _while_it_stands(self) -> None:
        await self._enter(Phase.HELD)
        await self.storage.end()
        await self._enter(Phase.ENDED)
        await self.landing.end_exports()
        await self._enter(Phase.SENT)
        try:
            await self.stream.go_on()
            await self.stream.until_completed()
        except DisconnectedError:
            # Without a last word; whether it had sent all the destination knows.
            if not await self._source_has_ended_standing():
                raise
        await self.landing.until_it_has_all()
        await self._enter(Phase.LANDED)

    async def _hand_over(self) -> None:
        """Have the arbiter say where the guest runs, then have it run there."""
        monitor, run = self.source.monitor, self.record.run
        if not await self.landing.answers():
            raise Error("the destination had all of the guest, and does not answer any more")
        try:
            said = await arbiter.claim(monitor, run, Side.DESTINATION)
        except DisconnectedError:
            if not await self._source_has_ended_standing():
                raise
            said = Side.DESTINATION  # who has ended cannot run
        if said is not Side.DESTINATION:
            raise Error(
                "another controller has had the guest go on at the source meanwhile",
                remedy="see which one: it recovers what it took for the leftovers of a dead one",
            )
        await self._enter(Phase.HANDED)
        await arbiter.mark(self.landing.vm.monitor, run)
        runs, stood = told_at(await self.landing.run()), self.stream.stopped
        self.job.course.resumes(time.monotonic())
        if runs is not None and stood is not None:
            self.downtime = max(0.0, runs - stood)

    async def _source_has_ended_standing(self) -> bool:
        """Whether it is gone, and its guest had not gone on there: then that one's disks count."""
        return await self._source_has_ended() and not self.stream.went_on

    async def _source_has_ended(self) -> bool:
        """Whether the source's very process is certainly gone."""
        said = self.hold.record
        deadline = time.monotonic() + _ENDING
        while not has_ended(said, said.source):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_LOOK)
        return True

    # -- the way back

    @asynccontextmanager
    async def or_back(self, *, quit_source: bool, began: float) -> AsyncIterator[None]:
        """Clean up where the guest is there; where the body failed before that, have it stay."""
        try:
            try:
                yield
            except BaseException as error:
                if not self.job.gone_over:
                    await undisturbed(self._back(error))
                    raise
                ended = await undisturbed(self._finish(quit_source=quit_source))
                if isinstance(error, Error) and error.standing is None:
                    error.standing = _HANDED
                    error.remedy = (
                        "look whether it runs, else continue it (cont); if its QEMU has ended, "
                        "start the guest from its images"
                    )
                self._say(began, ended=ended)
                raise
            ended = await undisturbed(self._finish(quit_source=quit_source))
            self._say(began, ended=ended)
        finally:
            self.stream.close()
            await undisturbed(self._close_storage())
            await undisturbed(self.hold.let_go(settled=self._settled))

    def _say(self, began: float, *, ended: bool) -> None:
        course = self.job.course
        self.job.result = MigrationResult(
            disks=tuple(
                MigratedDisk(
                    pair.source.name,
                    pair.source.chain.active.file,
                    pair.destination.chain.active.file,
                    pair.source.chain.root.size,
                    copied,
                    course.mirror(mirror),
                )
                for pair, copied, mirror in zip(
                    self.plan.copied, self.storage.copied, self.storage.jobs, strict=True
                )
            ),
            seconds=time.monotonic() - began,
            downtime=self.downtime,
            qemu_downtime=self.stream.downtime,
            longest_stall=course.longest_stall,
            stopped=course.stopped,
            resumed=course.resumed,
            transferred=self.stream.transferred,
            phases=course.phases(time.monotonic()),
            passes=course.passes(),
            source="ended" if ended else "postmigrate",
            warnings=tuple(self._warnings),
        )

    async def _finish(self, *, quit_source: bool) -> bool:
        """Take away what is ours at both sides; return whether the source has ended."""
        known = len(self._warnings)
        ended = await self._clear_both(quit_source=quit_source)
        self._settled = len(self._warnings) == known
        return ended

    async def _clear_both(self, *, quit_source: bool) -> bool:
        try:
            await self.landing.leave()
            await arbiter.withdraw(self.landing.vm.monitor, self.record.run)  # the mark
        except Error as error:
            self._warn("at the destination", error)
        try:
            await self.change.undo()
            await self.stream.restore()
            if quit_source:
                await self.source.monitor.execute("quit")
        except DisconnectedError:
            return await self._source_has_ended()
        except Error as error:
            self._warn("at the source", error)
        return quit_source and await self._source_has_ended()

    def _warn(self, where: str, error: Error) -> None:
        self._warnings.append(f"the guest has gone over, but {where}: {printable(error)}")

    async def _close_storage(self) -> None:
        try:
            await self.storage.close()
        except Error as error:
            _log.debug("a wire did not end well: %s", error)  # what that means was said by then

    async def _back(self, error: BaseException) -> None:
        """Have the guest go on at the source, and leave nothing; say so in the error.

        :raise Error: it does not, or something is left: the error says what.
        """
        answers = await self.landing.answers()
        if not answers or self.source.monitor.closed:
            self._cut()
        if self.source.monitor.closed:
            await self._lost(error)
            return
        if self.stream.begun:
            await self._bring_back()
        await self.storage.break_off()
        if answers:
            with contextlib.suppress(Error):  # it has just ended, say
                await self.landing.end_exports()
        await self.stream.restore()
        await self.change.undo()
        stands = await self.landing.give_up()
        if self.landing.vm.monitor.closed:
            # If it was needed: nobody else can run any more.
            await arbiter.withdraw(self.source.monitor, self.record.run)
        self._settled = True
        if isinstance(error, Error):  # whatever was said, before it was undone
            error.standing = (
                f"the guest runs at the source, where nothing of ours is left; {stands}"
            )

    def _cut(self) -> None:
        self.stream.cut()
        self.storage.cut()

    async def _bring_back(self) -> None:
        """Wait until the guest goes on at the source, which is told to give up the migration.

        :raise Error: it does not, or must not.
        """
        began = time.monotonic()
        # One that is on its way cannot be called back now: the guest might stand for ever (K35).
        self.stream.cut()
        while True:
            state = await self._within(self.stream.state())
            if state is not None and state[1] == "pre-switchover":
                await self._within(self.stream.cancel())
            if state == ("postmigrate", "completed"):
                await self._reclaim()
                return
            if state is not None and state[0] == "running" and state[1] in OVER:
                return
            late = time.monotonic() - began
            if late > HOLD:
                self._cut()
            if late > HOLD + self.source.stall:
                raise StalledError(
                    f"the guest does not go on at the source: {state or 'its monitor is silent'}",
                    standing="the migration was given up; the destination was not continued",
                    remedy="continue the source (cont), unless the object "
                    f"{handover_name(self.record.run)} in it says destination (qom-get)",
                )
            await asyncio.sleep(_LOOK)

    async def _within(
        self, command: Coroutine[Any, Any, tuple[str, str] | None]
    ) -> tuple[str, str] | None:
        """Give a command some seconds, then cut every wire: QEMU may wait for one (K32)."""
        try:
            async with asyncio.timeout(HOLD):
                return await command
        except TimeoutError:
            self._cut()
        except CommandError as error:
            _log.debug("while the guest is brought back: %s", error)
        return None

    async def _reclaim(self) -> None:
        """Have the guest go on at a source that had sent it away; nobody else may, by the arbiter.

        :raise Error: somebody has had it go on at the destination.
        """
        said = await arbiter.claim(self.source.monitor, self.record.run, Side.SOURCE)
        if said is not Side.SOURCE:
            self.job.enter(Phase.HANDED)
            raise Error(
                "another controller has had the guest go on at the destination meanwhile",
                standing=_HANDED,
                remedy="end the source (quit), and never continue it",
            )
        # First the one that must not run: where both have the same images, it has them locked.
        await self.landing.give_up()
        await wayback.cont(self.source)

    async def _lost(self, error: BaseException) -> None:
        """Say what stands where the source cannot be reached any more."""
        said = error if isinstance(error, DisconnectedError) else DisconnectedError("lost")
        if self.job.phase is Phase.LANDED:
            await self.change.after_disconnect(said)
            said.standing = "all of the guest is at the destination, which stands (paused)"
            said.remedy = (
                "if the source's QEMU has certainly ended, continue the destination (cont); else "
                "reach the source, and see whether it runs"
            )
            return
        stands = await self.landing.give_up()
        await self.change.after_disconnect(said)
        said.standing = f"{said.standing}; {stands}"


_HANDED = "the guest belongs to the destination now; never continue the source"
