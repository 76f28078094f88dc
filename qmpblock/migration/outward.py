"""The way there: each move of `ORDER`, until the guest runs at the destination."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.chains.plan import check_unchanged
from qmpblock.errors import BusyError, DisconnectedError, Error, StalledError, printable
from qmpblock.migration import arbiter, wayback
from qmpblock.migration.likeness import reserve_alike
from qmpblock.migration.pairing import check_pairing
from qmpblock.migration.states import ORDER, Move, Phase, Planned, Side
from qmpblock.migration.stream import told_at
from qmpblock.qemu.runstate import STOPPED_ITSELF

if TYPE_CHECKING:
    from qmpblock.migration.passage import Passage

__all__ = ["STANDSTILL", "Outward"]

STANDSTILL = 10.0
"""Seconds for which the guest may stand; then it goes on at the source."""

_OF_DISKS = frozenset({Move.MIRROR, Move.AWAIT_READY})  # there is nothing in them without any


class Outward:
    """What is done, one move after the other. `go`, then `finish`."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage
        self._left = iter(ORDER)
        self._moves = {
            Move.CHECK: self._check,
            Move.MIRROR: self._mirror,
            Move.AWAIT_READY: self._await_ready,
            Move.MIGRATE: self._migrate,
            Move.AWAIT_HELD: passage.stream.until_held,
            Move.SAY_STOPPED: self._say_stopped,
            Move.END_MIRRORS: self._end_mirrors,
            Move.UNEXPORT: passage.landing.end_exports,
            Move.CONTINUE: passage.stream.go_on,
            Move.AWAIT_LANDED: self._await_landed,
            Move.CLAIM_DESTINATION: self._claim,
            Move.MARK: self._mark,
            Move.CONT_DESTINATION: self._cont,
        }

    async def go(self) -> None:
        """Bring the guest there.

        Cancelling leaves it in the phase in which it is; whoever brings it home goes on from there.

        :raise Error: see `qmpblock.migrate`.
        """
        await self._through(Move.MIRROR)
        try:
            async with self._passage.stream.standing(STANDSTILL):
                passage = self._passage
                pausing = passage.pause.at_the_deadline(passage.storage.hurry)
                async with passage.stream.powered(), pausing, passage.storage.watched():
                    await self._through(Move.AWAIT_HELD)
                await self._through(Move.AWAIT_LANDED)
        except TimeoutError:
            phase = self._passage.job.phase
            silent = ", or its QEMU answered nothing" if phase.before(Phase.HELD) else ""
            more = " more" if self._passage.pause.stands else ""  # than it was paused
            raise StalledError(
                f"the guest stood for {STANDSTILL:g} s{more}{silent} (phase {phase.value}): too "
                "long",
                remedy="look what the destination, its storage or the network waits for",
            ) from None
        await undisturbed(self._through(Move.CONT_DESTINATION))

    async def _through(self, last: Move) -> None:
        """Make the moves that are left, up to one of them."""
        copies = bool(self._passage.plan.copied)
        for planned in self._left:
            if copies or planned.move not in _OF_DISKS:
                await self._make(planned)
                if planned.reaches is not None:
                    await self._passage.enter(planned.reaches)
            if planned.move is last:
                return

    async def _make(self, planned: Planned) -> None:
        """Make a move, and say which phase it enters: before it, or while it is made."""
        move = self._moves[planned.move]
        if planned.enters is None:
            await move()
        elif planned.beside:
            entering = asyncio.create_task(self._passage.enter(planned.enters, beside=True))
            try:
                await move()
            finally:
                await undisturbed(entering)
        else:
            await self._passage.enter(planned.enters)
            await move()

    async def _check(self) -> None:
        passage, copied = self._passage, self._passage.plan.copied
        await passage.hold.begin()
        async with task_group() as group:
            group.create_task(self._check_disks())
            group.create_task(passage.landing.lock(serving=len(copied)))
            group.create_task(passage.hold.write(Phase.MIRRORING if copied else Phase.MEMORY))

    async def _check_disks(self) -> None:
        """See that the disks are what they were before they were locked."""
        passage = self._passage
        graph = await passage.source.graph()
        resumed = passage.storage.jobs if passage.plan.kept is not None else ()
        for device in passage.plan.disks:
            check_unchanged(graph, device, resumed)

    async def _mirror(self) -> None:
        passage = self._passage
        targets = await undisturbed(passage.landing.serve(passage.plan.copied))
        blank = [False for _ in targets]
        if passage.plan.kept is None:
            await undisturbed(passage.landing.look_in(targets))
            blank = await passage.landing.prepare(passage.plan.copied)
        await passage.storage.start(targets, blank)

    async def _await_ready(self) -> None:
        await self._until_ready()
        passage = self._passage
        for pair in passage.plan.copied:
            await undisturbed(reserve_alike(passage.landing.vm, pair.destination, pair.reserved))

    async def _until_ready(self) -> None:
        passage, after = self._passage, self._passage.means.write_blocking_after
        if after:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(after):
                    await passage.storage.until_ready()
                return
            passage.job.say(
                "the guest's writes wait from now on until they are at the destination, too "
                f"(write-blocking): after {after:g} s the disks have not caught up with it"
            )
            await passage.storage.have_writes_wait()
        await passage.storage.until_ready()

    async def _migrate(self) -> None:
        passage = self._passage
        for notice in passage.means.notices():
            passage.job.say(notice)
        await self._check_pairing()
        async with task_group() as group:
            group.create_task(passage.landing.store())
            group.create_task(self._prepare())
        passage.storage.hurry()
        await passage.change.allow_migration()
        await passage.stream.start(passage.landing)

    async def _check_pairing(self) -> None:
        """See that both still fit: to copy the disks may have taken hours."""
        passage, plan = self._passage, self._passage.plan
        both, run = (passage.source, passage.landing.vm), passage.record.run
        await passage.unchanged.note()  # first: what is compared then is what stays
        pairing = await check_pairing(*both, plan.terms, resumed=run, copied=True)
        if pairing.disks != plan.paths:
            raise BusyError("a disk was plugged in or out meanwhile", remedy="try again")

    async def _prepare(self) -> None:
        """Tell QEMU how to migrate."""
        passage = self._passage
        await passage.bitmaps.prepare()
        shared = () if passage.plan.copied else passage.plan.pairs
        await passage.actives.note([one.source for one in shared] or passage.bitmaps.disks)
        await passage.stream.prepare()

    async def _say_stopped(self) -> None:
        passage = self._passage
        await passage.actives.check()
        passage.stopped = passage.stream.stood_before and not passage.pause.stands
        if passage.stopped:
            await wayback.mark_stopped(passage.source, passage.record.run)

    async def _end_mirrors(self) -> None:
        passage = self._passage
        # It is the last moment in which what is copied can be kept.
        if passage.images is not None and not await passage.landing.answers():
            raise Error("the destination does not answer any more")
        await passage.storage.end()
        await passage.bitmaps.count()

    async def _await_landed(self) -> None:
        passage = self._passage
        with contextlib.suppress(DisconnectedError):  # which is heard again, below
            await passage.stream.until_told()
        # The guest stands: both are asked at once. But what went wrong the source knows.
        arriving = asyncio.ensure_future(passage.landing.until_it_has_all())
        try:
            await self._until_completed()
            passage.shows = await arriving
        finally:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
        # It stopped itself after the last look at it: only what was sent tells of that.
        passage.stopped = passage.stopped or passage.shows in STOPPED_ITSELF
        await passage.bitmaps.check()

    async def _until_completed(self) -> None:
        try:
            await self._passage.stream.until_completed()
        except DisconnectedError:
            # Without a last word; whether it had sent all the destination knows.
            if not await self._passage.source_has_ended_standing():
                raise

    async def _claim(self) -> None:
        """Have the arbiter say where the guest runs."""
        passage = self._passage
        await passage.unchanged.check()  # and that the destination answers
        try:
            said = await arbiter.claim(
                passage.source.monitor,
                passage.record.run,
                Side.DESTINATION,
                to=passage.hold.record.destination,
                stopped=passage.stopped,
            )
        except DisconnectedError:
            if not await passage.source_has_ended_standing():
                raise
            said = Side.DESTINATION  # who has ended cannot run
        if said is not Side.DESTINATION:
            raise Error(
                "another controller has had the guest go on at the source meanwhile",
                remedy="see which one: it recovers what it took for the leftovers of a dead one",
            )

    async def _mark(self) -> None:
        passage = self._passage
        await arbiter.mark(passage.landing.vm.monitor, passage.record.run, stopped=passage.stopped)

    async def _cont(self) -> None:
        passage = self._passage
        if passage.stopped:
            passage.job.say(_stays(passage.shows))
            return
        runs, stood = told_at(await passage.landing.run()), passage.stream.stopped
        passage.job.course.resumes(time.monotonic())
        if runs is not None and stood is not None:
            passage.downtime = max(0.0, runs - stood)

    # -- FINISH_DESTINATION

    async def finish(self, *, quit_source: bool) -> None:
        """Take away what is ours at both sides, and say what it came to; warns, and never fails.

        :param quit_source: whether the source's QEMU is to end.
        """
        known = len(self._passage.warnings)
        ended = await self._clear_both(quit_source=quit_source)
        self._passage.settled = len(self._passage.warnings) == known
        self._passage.say(ended=ended)

    async def _clear_both(self, *, quit_source: bool) -> bool:
        _, ended = await asyncio.gather(
            self._clear_destination(), self._clear_source(quit_source=quit_source)
        )
        return ended

    async def _clear_destination(self) -> None:
        passage = self._passage
        try:
            passage.shows = await passage.landing.run_state()
            await passage.landing.leave()
            await arbiter.withdraw(passage.landing.vm.monitor, passage.record.run)  # the mark
            await passage.bitmaps.restore(passage.landing.vm)
        except Error as error:
            self._warn("at the destination", error)

    async def _clear_source(self, *, quit_source: bool) -> bool:
        passage = self._passage
        try:
            if passage.means.pause_after:
                await wayback.unmark_pause(passage.source, passage.record.run)
            await passage.storage.take_away()
            await passage.change.undo()
            passage.storage.is_gone()
            await passage.stream.look_back()
            await passage.stream.restore()
            await passage.bitmaps.restore(passage.source)
            if quit_source:
                await passage.source.monitor.execute("quit")
        except DisconnectedError:
            return await passage.source_has_ended()
        except Error as error:
            self._warn("at the source", error)
        return quit_source and await passage.source_has_ended()

    def _warn(self, where: str, error: Error) -> None:
        self._passage.warnings.append(f"the guest has gone over, but {where}: {printable(error)}")


def _stays(shown: str) -> str:
    """Say that a guest is not continued, and why."""
    if shown in STOPPED_ITSELF:
        return f"the guest stays as it is: it stopped itself at the source ({shown})"
    return "the guest stays paused: somebody else had stopped it at the source"
