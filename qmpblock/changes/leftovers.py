"""What controllers that died left in a VM: found, and undone, by what QEMU tells of it.

While QEMU lives, everything that a dead controller left can be read from QEMU itself: the
lock's data says what it was about, the graph and the jobs how far it got. (After QEMU died, see
`qmpblock.changes.imagerecovery`.)

A pivot that is pending comes first, before any lock is taken: it holds the guest's I/O (K5).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qmpblock.cancellation import undisturbed
from qmpblock.changes.backupnote import read_note, undo_dead_backup
from qmpblock.changes.finalize import pivot
from qmpblock.changes.identity import identify
from qmpblock.changes.journal import discard_torn
from qmpblock.changes.nomigration import allow_migration
from qmpblock.changes.operations import read_record
from qmpblock.changes.record import Record, VMIdentity
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.survey import find, is_of, is_same_process, journals, survey
from qmpblock.changes.unfinished import steps
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    CommandError,
    RecordError,
    UnsupportedError,
    printable,
)
from qmpblock.export.server import ServerUse, undo_dead_run
from qmpblock.export.session import clear_dead
from qmpblock.graph.model import BlockGraph
from qmpblock.names import (
    MIGRATION_LOCK,
    LockKind,
    blocker_name,
    is_create_job,
    is_of_run,
    is_pivot,
    lock_kind,
    lock_of_turn,
    new_run,
    run_of,
)
from qmpblock.qemu import lock, ownership, polling
from qmpblock.qemu.job import Job
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.threshold import Watch, disarm_dead
from qmpblock.versioned import UnreadableError

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = [
    "OWN_REMEDY",
    "CarryOn",
    "Recovery",
    "check_all_said",
    "check_way",
    "clear",
    "make_way",
    "record_of",
    "undo_dead_change",
]

#: Carries one dead change on, telling of each step; False if another controller does by now.
CarryOn = Callable[["Connection", Holder, Record, Callable[[Step], None]], Awaitable[bool]]

OWN_REMEDY = "wait for it, or end it; if it hangs, kill it, then: qmpblock recover ADDRESS"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovery:
    """What was done, or is to be done, about one thing that a dead controller left.

    :ivar what: what it was about, for people.
    :ivar run: the run id of the dead controller.
    :ivar steps: what was (in a dry run: is to be) done, and why, in order; in a dry run only
        what can be seen by now.
    :ivar done: whether the change took effect in the end; None where that does not apply.
    """

    what: str
    run: str
    steps: tuple[Step, ...]
    done: bool | None


@dataclass(frozen=True)
class _Orphans(Record):
    """What bears the name of a run whose record is gone: the names are all that is known of it."""

    operation: ClassVar[str] = "change"

    @property
    def pivot(self) -> bool:
        """What its job's name says."""
        return is_pivot(self.job)


@dataclass(frozen=True)
class _Kind:
    """What a lock of one kind means. A new kind of lock is a new one of these.

    :ivar check: sees that what a dead holder says of its work can be read, and is all.
    :ivar undo: removes what a dead holder left, and does not touch its lock; None where what it
        left is undone by whoever stops iothreads from polling, as every recovery does.
    """

    check: Callable[[str, Holder, BlockGraph], object]
    undo: Callable[[Connection, Holder, str], Awaitable[None]] | None


def _check_change(name: str, dead: Holder, graph: BlockGraph) -> None:
    check_all_said(dead, record_of(dead, name), graph, name)


async def _undo_change(vm: Connection, dead: Holder, _: str) -> None:
    await undo_dead_change(vm, dead)


async def _undo_exports(vm: Connection, dead: Holder, name: str) -> None:
    await undo_dead_run(vm.monitor, dead, vm.stall, name)


async def _undo_watch(vm: Connection, dead: Holder, _: str) -> None:
    await disarm_dead(vm, dead)


async def _refuse_migration(_vm: Connection, dead: Holder, name: str) -> None:
    raise _broken_off(dead, name)


def _broken_off(dead: Holder, name: str) -> BusyError:
    return BusyError(
        f"a migration of this VM was broken off: {dead} held {name}, and is gone",
        standing="what it left was not touched",
        remedy="recover it first, which may end one of its two QEMUs: qmpblock recover ADDRESS",
    )


_KINDS = {
    LockKind.DISK: _Kind(_check_change, _undo_change),
    LockKind.NBD: _Kind(lambda name, dead, _: dead.says(ServerUse, name), _undo_exports),
    LockKind.AHEAD: _Kind(lambda name, dead, _: dead.says(Watch, name), _undo_watch),
    LockKind.GUARD: _Kind(lambda name, dead, _: dead.says(polling.Guard, name), None),
    LockKind.POLLING: _Kind(lambda *_: None, None),  # it says nothing
    LockKind.MIGRATION: _Kind(lambda *_: None, _refuse_migration),  # it is of two VMs
    LockKind.BACKUP: _Kind(lambda name, dead, _: read_note(dead, name), undo_dead_backup),
}


def _kind(name: str) -> LockKind | None:
    """Return what a lock is about; of a turn to undo one, what that one is."""
    return lock_kind(lock_of_turn(name) or name)


async def clear(
    vm: Connection,
    *,
    dry_run: bool = False,
    tell: Callable[[str, Step], None] | None = None,
    carry_on: CarryOn | None = None,
    known: bool = False,
) -> list[Recovery]:
    """Undo all that controllers that died left in a VM. See `VM.recover`.

    :param carry_on: what is done with a change instead, if anything.
    :param known: whether the images are known to be this QEMU's, though it does not show it.
    """
    if dry_run:
        return await _foresee_all(vm, carry_on)
    try:
        if not known:
            await ownership.ask(vm.monitor)
    except UnsupportedError:
        # There may be nothing to do, and that can be said. What there is would be done to
        # images that are somebody else's: a change that is undone writes, too.
        recoveries = await _foresee_all(vm, carry_on)
        if any(step.verb != "leave" for one in recoveries for step in one.steps):
            raise
        return recoveries
    left = await _Left.read(vm)
    # First, for until then the guest is held by a drain; and before polling is touched (K9).
    await _release_guests(vm, left.graph, [record for _, record in left.changes])
    async with polling.unpolled(vm.monitor, wake=True):
        recoveries = _left_alone(left.holders)
        for holder, record in left.changes:
            recoveries.append(await _clear_change(vm, holder, record, carry_on, tell))
        recoveries += await _clear_rest(vm, left, tell=tell)
    left.raise_what_is_not_known()
    return recoveries


async def _foresee_all(vm: Connection, carry_on: CarryOn | None) -> list[Recovery]:
    """Say what `clear` would do. Changes nothing."""
    left = await _Left.read(vm)
    choice = Choice.UNDO if carry_on is None else Choice.CONTINUE
    recoveries = _left_alone(left.holders)
    for _, record in left.changes:
        recoveries.append(_foresee(record, left.graph, choice, await identify(vm)))
    recoveries += await _clear_rest(vm, left, dry_run=True)
    left.raise_what_is_not_known()
    return recoveries


async def _clear_rest(
    vm: Connection,
    left: _Left,
    *,
    dry_run: bool = False,
    tell: Callable[[str, Step], None] | None = None,
) -> list[Recovery]:
    """Clear what is no change: what has no lock, locks that hold nothing, journals."""
    recoveries: list[Recovery] = []
    if not left.unread:  # whose lock cannot be read, of that nothing else tells what it left
        recoveries += await _clear_orphans(vm, left.graph, left.holders, dry_run=dry_run, tell=tell)
    recoveries += await _clear_locks(vm, left.holders, dry_run=dry_run)
    if not left.unread:
        left.unread.extend(await _forget_journals(vm, recoveries, dry_run=dry_run))
    return recoveries


@dataclass(frozen=True)
class _Left:
    """What controllers left in a VM, or use there.

    :ivar holders: of each lock of ours, by the lock's name.
    :ivar changes: of those that died, with what each says.
    :ivar unread: why what is ours cannot be read, where that is so.
    """

    graph: BlockGraph
    holders: dict[str, Holder]
    changes: tuple[tuple[Holder, Record], ...]
    unread: list[RecordError]

    @classmethod
    async def read(cls, vm: Connection) -> Self:
        graph = await vm.graph()  # before the locks: what has no lock by then has no controller
        holders, unread = await _holders(vm, graph)
        dead = {
            holder.run: holder
            for name, holder in holders.items()
            if lock_kind(name) is LockKind.DISK and holder.is_dead()
        }
        migration = holders.get(MIGRATION_LOCK)
        if migration is not None and migration.is_dead():
            raise _broken_off(migration, MIGRATION_LOCK)
        said = [(holder, record_of(holder)) for holder in dead.values()]
        changes = tuple((holder, record) for holder, record in said if record is not None)
        return cls(graph, holders, changes, unread)

    def raise_what_is_not_known(self) -> None:
        """Refuse to call it all clear where somebody may still be at work, or cannot be read."""
        _refuse_the_unknown(self.holders)
        if self.unread:
            raise self.unread[0]


async def _holders(
    vm: Connection, graph: BlockGraph
) -> tuple[dict[str, Holder], list[RecordError]]:
    """Return who holds each lock of ours in the VM, by the lock's name, and those unreadable."""
    holders: dict[str, Holder] = {}
    unread: list[RecordError] = []
    ours = await lock.holders(vm.monitor, lambda name: _kind(name) is not None)
    for name, holder in ours.items():
        try:
            if isinstance(holder, str):
                raise lock.unreadable(name, holder)
            # A turn was about to undo what another lock tells of, which is there too.
            kind = _kind(name) if lock_of_turn(name) is None else None
            if kind and holder.is_dead() and (kind is LockKind.DISK or not holder.is_idle):
                _KINDS[kind].check(name, holder, graph)
        except RecordError as error:
            unread.append(error)
        else:
            holders[name] = holder
    return holders, unread


def _left_alone(holders: dict[str, Holder]) -> list[Recovery]:
    """Say which controllers are at work."""
    return [
        Recovery(
            f"use of {name}",
            holder.run,
            (Step("leave", name, f"{holder} is at work on it"),),
            None,
        )
        for name, holder in holders.items()
        if not holder.is_dead() and not holder.is_elsewhere() and not _is_of_polling(name)
    ]


def _is_of_polling(name: str) -> bool:
    """Whether it is a lock that says nothing but that iothreads do not poll meanwhile."""
    return lock_kind(name) in (LockKind.POLLING, LockKind.GUARD)


def _refuse_the_unknown(holders: dict[str, Holder]) -> None:
    for name, holder in holders.items():
        if holder.is_elsewhere():
            raise BusyError(
                f"{holder} holds {name}; it ran on another host or in another container, and "
                "whether it still does cannot be told from here",
                standing="what it left was not touched",
                remedy="run this where it ran. If it is certainly dead, remove its lock and run "
                f'this again: object-del {{"id": "{name}"}}',
            )


async def _release_guests(vm: Connection, graph: BlockGraph, records: Iterable[Record]) -> None:
    """Deal with the jobs of dead controllers that hold a guest's I/O, and with nothing else."""
    for record in records:
        if any(record.holding(graph, stale=None)):
            await _release_guest(vm, graph, record)


async def _release_guest(vm: Connection, graph: BlockGraph, record: Record) -> None:
    unreadable = False
    try:
        journal = find(record, await identify(vm))
        stale = None if journal is None else journal.pivoted
    except RecordError:
        # Nothing can be marked: let what stands there be true. Without a word the guest stays on
        # the overlay, which has it all.
        journal, stale, unreadable = None, _says_pivoted(record), True
    for step in record.holding(graph, stale=stale):
        follower = Job(vm.monitor, step.what, record.operation)
        try:
            with contextlib.suppress(CommandError):  # another recovery was faster
                if step.verb != "pivot" or (unreadable and record.pivot and not stale):
                    await undisturbed(follower.cancel())
                elif unreadable:
                    await undisturbed(follower.finalize())
                else:
                    await undisturbed(pivot(journal, follower))
        finally:
            follower.end()


def _says_pivoted(record: Record) -> bool:
    """Whether a copy that is not ours to write says that the base is the image to trust."""
    copies = survey((record.home,)).unproven
    return any(copy.pivoted for copy in copies if copy.record == record)


def _foresee(record: Record, graph: BlockGraph, choice: Choice, me: VMIdentity) -> Recovery:
    journal = find(record, me)
    made = list(journal.made()) if journal is not None else []
    kept = journal.kept() if journal is not None else ()
    planned = list(steps(record, graph, choice, made, kept=kept))
    planned += [Step("remove", name, "the lock of a controller that died") for name in record.locks]
    return Recovery(record.describe(), record.run, tuple(planned), record.took_effect(graph))


async def _clear_change(
    vm: Connection,
    holder: Holder,
    record: Record,
    carry_on: CarryOn | None,
    tell: Callable[[str, Step], None] | None,
) -> Recovery:
    told: list[Step] = []

    def note(step: Step) -> None:
        told.append(step)
        if tell is not None:
            tell(record.describe(), step)

    if carry_on is None:
        await make_way(vm, record.locks, note)
    elif not await carry_on(vm, holder, record, note):
        return Recovery(record.describe(), record.run, (), None)
    done = record.took_effect(await vm.graph())
    return Recovery(record.describe(), record.run, tuple(told), done)


async def _clear_orphans(
    vm: Connection,
    graph: BlockGraph,
    holders: dict[str, Holder],
    *,
    dry_run: bool,
    tell: Callable[[str, Step], None] | None,
) -> list[Recovery]:
    """Remove what bears our name but has no lock (somebody removed it): the names suffice."""
    me = await identify(vm)
    runs = {holder.run for holder in holders.values()}
    orphans: dict[str, dict[str, list[str]]] = {}
    for kind, names in (("job", [job.id for job in graph.jobs]), ("node", list(graph.nodes))):
        for name in names:
            run = run_of(name)
            if run and run not in runs and not (kind == "node" and graph.users(name)):
                orphans.setdefault(run, {"job": [], "node": []})[kind].append(name)
    done = []
    for run, names_of in orphans.items():
        jobs = sorted(names_of["job"], key=is_create_job)
        record: Record = _Orphans(
            run=run,
            vm=me,
            devices=("",),
            names=("a disk",),
            locks=(),
            job=jobs[0] if jobs else "",
            helpers=tuple(jobs[1:]),
            nodes=tuple(sorted(names_of["node"], key=len)),
        )
        for journal in journals():
            if journal.record.run == run and is_same_process(journal.record.vm, me):
                known = journal.record.nodes
                others = tuple(node for node in record.nodes if node not in known)
                record = replace(journal.record, nodes=known + others)
        if dry_run:
            done.append(_foresee(record, graph, Choice.UNDO, me))
            continue
        told: list[Step] = []

        def note(step: Step, record: Record = record, told: list[Step] = told) -> None:
            told.append(step)
            if tell is not None:
                tell(record.describe(), step)

        await undisturbed(settle(vm, record, find(record, me), Choice.UNDO, note))
        done.append(Recovery(record.describe(), run, tuple(told), None))
    return done


async def _clear_locks(
    vm: Connection, holders: dict[str, Holder], *, dry_run: bool
) -> list[Recovery]:
    """Undo dead exports and watchers, and remove what is left of interrupted recoveries."""
    done = []
    names: dict[str, Holder] = {}
    for name, holder in holders.items():
        if not holder.is_dead():
            continue
        about = lock_of_turn(name)
        if about or lock_kind(name) is not LockKind.DISK or record_of(holder) is None:
            names.setdefault(about or name, holder)
    for name, holder in names.items():
        step = Step("remove", name, "the lock of a controller that died, and what it guards")
        done.append(Recovery(f"use of {name}", holder.run, (step,), None))
        if not dry_run:
            await _clear_lock(vm, name)
    return done


async def _clear_lock(vm: Connection, name: str) -> None:
    kind = _kind(name)
    performs = None if kind is None else _KINDS[kind].undo
    if performs is None:
        # The guard around this recovery has taken it over by now, if there is an iothread.
        left = await lock.read(vm.monitor, name)
        if isinstance(left, Holder) and left.is_dead():
            await lock.release(vm.monitor, name)
        return

    async def undo(dead: Holder) -> None:
        await performs(vm, dead, name)

    await lock.acquire(vm.monitor, name, Holder.me(new_run()), undo, stall=vm.stall)
    await lock.release(vm.monitor, name)


async def _forget_journals(
    vm: Connection, done: list[Recovery], *, dry_run: bool
) -> list[RecordError]:
    """Remove journals of this VM whose change has no lock any more: it ended.

    Returns an error for each that cannot be read.

    :param done: is added to.
    """
    me = await identify(vm)
    held = {holder.run for holder in (await _holders(vm, await vm.graph()))[0].values()}
    seen = survey()
    unread = [error for error in seen.unreadable if error.run not in held and is_of(error, me)]
    for journal in seen.journals:
        if not is_same_process(journal.record.vm, me):
            continue
        if journal.record.run in held or not me.pid:
            continue
        if not dry_run:
            # Its lock may have been removed by hand, as our own words propose.
            await undisturbed(settle(vm, journal.record, journal, Choice.UNDO))
        for path in journal.paths:
            step = Step("remove", str(path), "the change that it describes has ended")
            done.append(Recovery(journal.record.describe(), journal.record.run, (step,), None))
        if not dry_run:
            journal.remove()
    return unread


def record_of(holder: Holder, name: str = "") -> Record | None:
    """Return what the holder of a disk's lock is about; None if it is about nothing yet.

    :param name: of the lock, where it is known.
    :raise RecordError: what it says is not what this version understands.
    """
    if "record" not in holder.details:
        return None  # it only holds the lock to undo what another one left
    try:
        return read_record(holder.details["record"], holder.run)
    except UnreadableError as error:
        raise lock.unreadable(name or f"of {holder}", error, holder.run) from None


async def make_way(
    vm: Connection, names: Iterable[str], tell: Callable[[Step], None] | None = None
) -> None:
    """Undo what controllers that died left on disks, before anything is planned.

    Cancelling waits for the end of what has begun.

    :param names: of the disks' locks.
    :raise BusyError: another controller is at work on one of them; names it.
    """

    async def undo(dead: Holder) -> None:
        await undo_dead_change(vm, dead, tell)

    async def clear(name: str) -> None:
        me = Holder.me(new_run())
        await lock.acquire(vm.monitor, name, me, undo, stall=0, remedy=OWN_REMEDY)
        await lock.release(vm.monitor, name)
        # Exports come and go within a change: one that was killed may have left some, too.
        await clear_dead(vm.monitor, stall=vm.stall)

    for name in names:
        if await lock.read(vm.monitor, name) is not None:
            async with polling.unpolled(vm.monitor):
                await undisturbed(clear(name))


async def check_way(vm: Connection, names: Iterable[str]) -> None:
    """Refuse disks on which a controller is at work, or has left something. Changes nothing.

    :param names: of the disks' locks.
    :raise BusyError: names it.
    """
    for name in names:
        holder = await lock.read(vm.monitor, name)
        if holder is None:
            continue
        if isinstance(holder, str):
            raise lock.unreadable(name, holder)
        if holder.is_dead():
            raise BusyError(
                f"a controller that died left this disk in the middle of a change: {holder}",
                standing=UNTOUCHED,
                remedy="whatever changes the disk next undoes it first; so does: qmpblock recover "
                "ADDRESS",
            )
        raise BusyError(
            f"another controller is at work on this disk: {holder}",
            standing=UNTOUCHED,
            remedy="wait for it, or end it",
        )


async def undo_dead_change(
    vm: Connection, dead: Holder, tell: Callable[[Step], None] | None = None
) -> None:
    """Undo what the dead holder of a disk's lock left, its journal and other locks included.

    Idempotent. A pivot that was pending is finished, not undone.

    :raise RecordError: what it was about cannot be read: nothing is touched.
    """
    record = record_of(dead)
    check_all_said(dead, record, await vm.graph())
    _log.warning("undoing what a controller that died left in the VM: %s", dead)
    if record is None:
        return  # it died before it did anything
    me = await identify(vm)
    discard_torn(me, record.run)
    journal = find(record, me)
    await settle(vm, record, journal, Choice.UNDO, tell)
    await allow_migration(vm.monitor, record.run)
    if journal is not None:
        journal.remove()
    for name in sorted(record.locks, reverse=True):  # the first one says what they are for
        holder = await lock.read(vm.monitor, name)
        if isinstance(holder, Holder) and holder.run == dead.run and holder.is_dead():
            await lock.release(vm.monitor, name)


def check_all_said(dead: Holder, record: Record | None, graph: BlockGraph, name: str = "") -> None:
    """See that the holder of a disk's lock tells of all that bears the name of its run.

    :param name: of the lock, where it is known.
    :raise RecordError: there is a job or node that it does not tell of: another version made it.
    """
    said = {record.job, *record.helpers, *record.nodes} if record is not None else set()
    said.add(blocker_name(dead.run))
    for one in (*(job.id for job in graph.jobs), *graph.nodes):
        if is_of_run(one, dead.run) and one not in said:
            why = f"it does not say what {printable(one)} is for"
            raise lock.unreadable(name or f"of {dead}", why, dead.run)
