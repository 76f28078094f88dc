"""Recovery of a migration whose controller died: by both sides, or by the one that answers.

What is to be done `qmpblock.migration.decision.decide` says, one move after the other; here both
sides are found, the migration is taken in hand, and the moves are made. It may be killed anywhere,
and run again. Of two at once one gets the lock, and where each reaches another side alone, one gets
the arbiter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

from qmpblock.address import MonitorAddress, parse_monitor
from qmpblock.cancellation import undisturbed
from qmpblock.changes.leftovers import Recovery, clear
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.survey import is_same_process
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    MonitorError,
    MonitorHeldError,
    RequestError,
    StalledError,
    UndecidedError,
    shell_words,
)
from qmpblock.migration import arbiter, bitmaps, wayback
from qmpblock.migration.channels import clear_channels
from qmpblock.migration.decision import Decision, decide
from qmpblock.migration.hold import holder_of, record_of, side_of
from qmpblock.migration.imageserver import end_image_server, image_server_left
from qmpblock.migration.journal import MigrationJournal, journals
from qmpblock.migration.record import MigrationRecord
from qmpblock.migration.settings import put_back
from qmpblock.migration.sights import has_ended, look_at_both, process_of
from qmpblock.migration.states import Move, Phase, Reach, Seen, Side
from qmpblock.names import MIGRATION_LOCK, is_of_run, new_run
from qmpblock.qemu import lock
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.runstate import STANDS
from qmpblock.sockets import absolute

__all__ = ["recover_migration"]

_MOST = 24  # moves; of a migration there are some five to be made
_CLEARINGS = 3

Tell = Callable[[str, Step], None]


async def recover_migration(
    *addresses: str | MonitorAddress,
    carry_on: bool = False,
    force: Literal["source", "destination"] | None = None,
    dry_run: bool = False,
    tell: Tell | None = None,
    stall: float = 60.0,
) -> Recovery | None:
    """Bring a migration whose controller died to an end in which one side has the guest.

    That is the source, as long as it had not sent everything; from then on, while nobody has
    decided, whichever is wished. Nothing is done to a VM that is of no migration of ours.

    Cancelling waits for the end of the move that is under way; the rest is left as it is, and can
    be recovered again.

    :param addresses: the monitor of one side, or of both, in any order. The other side's is known
        by what the migration left, and by its journal.
    :param carry_on: have the guest go on at the destination, where both sides are possible.
    :param force: the side on which the guest is to go on where it cannot be told which has it: who
        says so has made sure that it runs on neither.
    :param dry_run: only say what is to be done first.
    :param tell: is called before each step, with what it belongs to.
    :param stall: seconds without an answer that count as a failure.
    :return: what was done, `done` telling whether the guest is at the destination; None where no
        migration of ours is left.
    :raise BusyError: its controller lives, or another recovery is at work.
    :raise MonitorHeldError: likewise, and it has one of the monitors.
    :raise RecordError: what it left cannot be read.
    :raise StalledError: a QEMU does not do what it is told to.
    :raise UndecidedError: a person has to decide: it says what each side shows, and what to do.
    """
    async with AsyncExitStack() as stack:
        found = _Found(stack, stall)
        migration = await found.find(addresses)
        if migration is None:
            return None
        choice = Choice.CONTINUE if carry_on else Choice.UNDO
        work = _Recovering(migration, choice, None if force is None else Side(force), tell)
        if dry_run:
            return await work.foresee()
        return await work.recover()


class _Migration:
    """A migration that was found, with its two sides as far as they can be reached."""

    def __init__(self, record: MigrationRecord, journal: MigrationJournal | None) -> None:
        self.record = record
        self.journal = journal
        self.source: Connection | None = None
        self.destination: Connection | None = None

    @property
    def sides(self) -> list[tuple[Side, Connection]]:
        """Those that can be reached, the source first."""
        both = (Side.SOURCE, self.source), (Side.DESTINATION, self.destination)
        return [(side, vm) for side, vm in both if vm is not None and not vm.monitor.closed]


class _Found:
    """Finds the migration that addresses are about, and connects to both sides of it."""

    def __init__(self, stack: AsyncExitStack, stall: float) -> None:
        self._stack = stack
        self._stall = stall
        self._open: dict[str, Connection] = {}
        self._failed: dict[str, MonitorError] = {}

    async def find(self, addresses: Sequence[str | MonitorAddress]) -> _Migration | None:
        names = [absolute(parse_monitor(one) if isinstance(one, str) else one) for one in addresses]
        for name in names:
            await self._connect(name)
        migration = await self._by_locks(names) or await self._by_journals(names)
        if migration is None:
            if len(self._failed) == len(names):
                raise self._failed[names[0]]
            return None
        record = migration.record
        migration.source = await self._side(record, Side.SOURCE, names)
        migration.destination = await self._side(record, Side.DESTINATION, names)
        return migration

    async def _connect(self, name: str) -> Connection | None:
        """Connect to a monitor once; None where that fails."""
        if name not in self._open and name not in self._failed:
            opening = Connection.open(name, NBDAccess(), stall=self._stall)
            try:
                self._open[name] = await self._stack.enter_async_context(opening)
            except MonitorHeldError as error:
                if error.holders:  # it lives, and somebody is at work on it
                    raise
                self._failed[name] = error
            except MonitorError as error:
                self._failed[name] = error
        return self._open.get(name)

    async def _by_locks(self, names: Sequence[str]) -> _Migration | None:
        found: MigrationRecord | None = None
        for name in names:
            vm = self._open.get(name)
            holder = None if vm is None else await lock.read(vm.monitor, MIGRATION_LOCK)
            if isinstance(holder, str):
                raise lock.unreadable(MIGRATION_LOCK, holder)
            if holder is None:
                continue
            record = record_of(holder)
            if found is not None and record.run != found.run:
                raise RequestError(
                    f"these VMs are of two migrations: the {found.describe()}, and the "
                    f"{record.describe()}",
                    standing=UNTOUCHED,
                    remedy="give the address of one of them",
                )
            found = record
        if found is None:
            return None
        of_run = [one for one in journals() if one.record.run == found.run]
        return _Migration(found, of_run[0] if of_run else None)

    async def _by_journals(self, names: Sequence[str]) -> _Migration | None:
        for journal in journals():
            record = journal.record
            for side in Side:
                who = record.of(side)
                if who.monitor not in names:
                    continue
                vm = self._open.get(who.monitor)
                # Another QEMU may be at that address by now.
                if vm is None or await _is_side(vm, record, side):
                    return _Migration(record, journal)
        return None

    async def _side(
        self, record: MigrationRecord, side: Side, names: Sequence[str]
    ) -> Connection | None:
        """Return the connection to one side: by its own address, or by one that was given."""
        for name in dict.fromkeys([record.of(side).monitor, *names]):
            vm = await self._connect(name)
            if vm is not None and await _is_side(vm, record, side):
                return vm
        return None


async def _is_side(vm: Connection, record: MigrationRecord, side: Side) -> bool:
    """Whether this is the very process that was one side of a migration.

    Where it cannot be seen, now or then, as by ssh, what lies in it says so: our lock, or the
    arbiter, which end with it. Another one may have been started at its address.
    """
    who, said = record.of(side), await process_of(vm)
    if who.pid and said.pid:
        return is_same_process(who, said)
    if who.uuid != said.uuid:
        return False
    holder = await lock.read(vm.monitor, MIGRATION_LOCK)
    if isinstance(holder, Holder):
        same = record_of(holder).run == record.run
        return same and side_of(holder) in (side, None)
    return who.monitor == said.monitor and await arbiter.decided(vm.monitor, record.run) is not None


class _Recovering:
    """One recovery."""

    def __init__(
        self, migration: _Migration, choice: Choice, force: Side | None, tell: Tell | None
    ) -> None:
        self._migration = migration
        self._choice = choice
        self._force = force
        self._tell = tell
        self._record = migration.record
        self._run = new_run()
        self._seen = Seen(Reach.UNREACHABLE), Seen(Reach.UNREACHABLE)
        self._quit = False  # whether the destination has obeyed that
        self._steps: list[Step] = []
        self._more: list[Recovery] = []

    @property
    def _phase(self) -> Phase | None:
        journal = self._migration.journal
        return None if journal is None else journal.phase

    @property
    def _stopped(self) -> bool:
        """Whether anything says that the guest had stopped, which is to stay so."""
        journal = self._migration.journal
        written = journal is not None and journal.stopped
        return written or any(side.stopped for side in self._seen)

    async def foresee(self) -> Recovery:
        """Say what is to be done first. Changes nothing."""
        for _, vm in self._migration.sides:
            await self._check_free(vm)
        decision = await self._decide()
        return self._told(decision, (self._step(decision),))

    async def recover(self) -> Recovery:
        """Make one move after the other."""
        try:
            for side, vm in self._migration.sides:
                await self._take(side, vm)
            return await self._go_on()
        except BaseException:
            lock.abandon(self._run)  # for the next one, of this process, too
            raise

    async def _go_on(self) -> Recovery:
        for _ in range(_MOST):
            decision = await self._decide()
            assert decision.move is not None  # or a person was asked
            step = self._step(decision)
            self._steps.append(step)
            if self._tell is not None:
                self._tell(self._record.describe(), step)
            await undisturbed(self._make(decision.move))
            if decision.last:
                return self._told(decision, tuple(self._steps))
        raise StalledError(
            f"the {self._record.describe()} does not come to an end after {_MOST} moves",
            standing=self._standing(),
        )

    def _step(self, decision: Decision) -> Step:
        assert decision.move is not None
        verb = decision.move.name.lower().replace("_", "-")
        return Step(verb, self._record.run, f"{decision.why}: {decision.move.value}")

    def _told(self, decision: Decision, steps: tuple[Step, ...]) -> Recovery:
        done = None if decision.owner is None else decision.owner is Side.DESTINATION
        return Recovery(self._record.describe(), self._record.run, steps, done)

    async def _decide(self) -> Decision:
        """Look at both sides, and decide.

        :raise UndecidedError: a person has to.
        """
        migration = self._migration
        here, there = await look_at_both(self._record, migration.source, migration.destination)
        if self._quit and not there.answers:  # by ssh its process is not seen to end
            there = Seen(Reach.GONE)
        self._seen = here, there
        left = image_server_left(self._record.run)
        decision = decide(
            self._phase,
            *self._seen,
            stopped=self._stopped,
            images=Reach.ANSWERS if left else Reach.GONE,
            choice=self._choice,
            force=self._force,
        )
        if decision.move is not None:
            return decision
        record = self._record
        sides = record.source.monitor, record.destination.monitor
        command = shell_words(["qmpblock", "recover", *sides])
        raise UndecidedError(
            f"the {record.describe()} was broken off, and a person has to decide: {decision.why}",
            standing=self._standing(),
            remedy=f"{decision.ask}. What you decide: {command} --force source, or --force "
            "destination",
        )

    def _standing(self) -> str:
        source, destination = self._seen
        phase = "no journal is here" if self._phase is None else f"the journal: {self._phase.value}"
        return f"the source: {source}; the destination: {destination}; {phase}"

    # -- whose it is

    async def _check_free(self, vm: Connection) -> Holder | None:
        """Return the dead controller that holds a side; None where nobody does.

        :raise BusyError: it lives, or that cannot be told.
        """
        holder = await lock.read(vm.monitor, MIGRATION_LOCK)
        if holder is None:
            return None
        if isinstance(holder, str):
            raise lock.unreadable(MIGRATION_LOCK, holder)
        if record_of(holder).run != self._record.run:
            raise BusyError(
                f"the VM of {vm.monitor.address} is of another migration by now: {holder}",
                standing=UNTOUCHED,
            )
        if holder.is_elsewhere() and self._force is None:
            raise BusyError(
                f"{holder} holds the {self._record.describe()}; it ran on another host or in "
                "another container, and whether it still does cannot be told from here",
                standing=UNTOUCHED,
                remedy="run this where it ran; or, if it has certainly ended, say with --force on "
                "which side the guest is to go on where that cannot be told",
            )
        if not holder.is_dead() and not holder.is_elsewhere():
            raise BusyError(
                f"{holder} is at work on the {self._record.describe()}",
                standing=UNTOUCHED,
                remedy="wait for it, or end it; if it hangs, kill it, then run this again",
            )
        return holder

    async def _take(self, side: Side, vm: Connection) -> None:
        """Take the migration in hand at one side."""
        me = holder_of(self._record, self._run, side)
        dead = await self._check_free(vm)
        if dead is None:
            await lock.acquire(vm.monitor, MIGRATION_LOCK, me, _nothing, stall=0)
        elif not await lock.adopt(vm.monitor, MIGRATION_LOCK, dead, me, _nothing):
            raise BusyError(
                f"another recovery of the {self._record.describe()} was faster",
                standing=UNTOUCHED,
                remedy="wait for it, then run this again: there may be nothing left to do",
            )

    # -- the moves

    async def _make(self, move: Move) -> None:
        migration, run = self._migration, self._record.run
        source, destination = migration.source, migration.destination
        if move is Move.END_IMAGES:
            await end_image_server(run)
        elif move is Move.FINISH_SOURCE:
            await self._finish_source()
        elif move is Move.FINISH_DESTINATION:
            await self._finish_destination()
        elif move is Move.QUIT_DESTINATION:
            assert destination is not None
            self._quit = await wayback.quit_vm(destination, self._destination_has_ended)
            if source is None or source.monitor.closed:
                self._leave_no_trace()
        elif move in (Move.MARK, Move.CONT_DESTINATION):
            assert destination is not None
            if move is Move.MARK:
                if migration.journal is not None:
                    migration.journal.enter(Phase.HANDED, stopped=self._stopped)
                await arbiter.mark(destination.monitor, run, stopped=self._stopped)
            else:
                await wayback.cont(destination)
        else:
            assert source is not None
            await self._at_source(move, source)

    async def _at_source(self, move: Move, source: Connection) -> None:
        run = self._record.run
        moves: dict[Move, Callable[[], Any]] = {
            Move.CANCEL: lambda: wayback.call_back(source, run),
            Move.SETTLE: lambda: wayback.settle(source, run),
            Move.CLAIM_SOURCE: lambda: arbiter.claim(source.monitor, run, Side.SOURCE),
            Move.CLAIM_DESTINATION: lambda: arbiter.claim(
                source.monitor,
                run,
                Side.DESTINATION,
                to=self._record.destination,
                stopped=self._stopped,
            ),
            Move.CONT_SOURCE: lambda: wayback.cont(source),
        }
        await moves[move]()

    def _destination_has_ended(self) -> bool:
        return has_ended(self._record, self._record.destination)

    async def _finish_source(self) -> None:
        """Remove what is left at the source: of the disks' mirrors, and of the migration."""
        source, destination = self._seen
        vm = self._migration.source
        if source.answers:
            assert vm is not None
            await put_back(vm.monitor, self._record.source_had)
            await bitmaps.put_back(vm, self._record.run)
            await wayback.unmark_pause(vm, self._record.run)
            # Where the destination may be there, the arbiter goes on keeping it from the guest.
            if source.decided is None or destination.reach is Reach.GONE:
                await arbiter.withdraw(vm.monitor, self._record.run)
            await lock.release(vm.monitor, MIGRATION_LOCK)
            await wayback.cut(vm.monitor, self._record.run)  # a silent wire would keep its node
            await _clear(vm, known=source.run == "postmigrate")  # with a guest that was stopped
        self._leave_no_trace()

    async def _finish_destination(self) -> None:
        """Remove what is left at the destination, and quit the source."""
        source, destination = self._seen
        here, there = self._migration.source, self._migration.destination
        if source.answers:
            assert here is not None
            await wayback.quit_vm(here, lambda: has_ended(self._record, self._record.source))
        if destination.answers:
            assert there is not None
            await put_back(there.monitor, self._record.destination_had)
            await bitmaps.put_back(there, self._record.run)
            await arbiter.withdraw(there.monitor, self._record.run)
            await _drop_credentials(there, self._record.run)
            await lock.release(there.monitor, MIGRATION_LOCK)
            await _clear(there, known=destination.run in STANDS)
        self._leave_no_trace()

    def _leave_no_trace(self) -> None:
        clear_channels(self._record.run)
        if self._migration.journal is not None:
            self._migration.journal.remove()


async def _clear(vm: Connection, *, known: bool) -> None:
    """Undo what the migration made for its disks, which has no holder any more.

    :param known: whether a QEMU has the guest that shows it only once that is continued.
    """
    for _ in range(_CLEARINGS):  # what has ended may have kept something else from going
        left = await clear(vm, known=known)
        if all(step.verb == "leave" for one in left for step in one.steps):
            return


async def _drop_credentials(destination: Connection, run: str) -> None:
    """Have its next migration not look for credentials of this one's."""
    parameters = await destination.monitor.execute("query-migrate-parameters")
    if is_of_run(str(parameters.get("tls-creds", "")), run):
        await destination.monitor.execute("migrate-set-parameters", {"tls-creds": ""})


async def _nothing(_: Holder) -> None:
    """Undo nothing: what a dead one left of a migration is what is recovered."""
