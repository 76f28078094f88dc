"""Recovery after a controller died; after QEMU did, see `qmpblock.changes.imagerecovery`.

While QEMU lives, everything that a dead controller left can be read from QEMU itself: the
lock's data says what it was about, the graph and the jobs how far it got.

A pivot that is pending comes first, before any lock is taken: it holds the guest's I/O (K5).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.allocation.watch import Watch, disarm_dead
from qmpblock.cancellation import undisturbed
from qmpblock.chains.jobs import carry_on
from qmpblock.changes.change import (
    AHEAD_LOCKS,
    LOCKS,
    Change,
    check_all_said,
    identify,
    make_way,
    record_of,
    undo_dead_change,
)
from qmpblock.changes.finalize import pivot
from qmpblock.changes.record import Record, VMIdentity
from qmpblock.changes.settle import settle
from qmpblock.changes.survey import find, is_of, is_same_process, journals, survey
from qmpblock.changes.unfinished import Choice, Step, steps, took_effect
from qmpblock.errors import (
    BusyError,
    CommandError,
    RecordError,
    UnsupportedError,
    printable,
)
from qmpblock.export.server import ServerUse, undo_dead_run
from qmpblock.export.session import LOCK as NBD_LOCK
from qmpblock.graph.model import BlockGraph
from qmpblock.host.statedirectory import state_directory
from qmpblock.qemu import lock, ownership, polling
from qmpblock.qemu.job import Job
from qmpblock.qemu.lock import Holder

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["Recovery", "recover"]

_NAME = re.compile(r"qmpblock-([0-9a-f]{8})-(.+)")
_OTHER_LOCKS = (NBD_LOCK, polling.LOCK)
_TURNS = tuple(f"{name}-undo-" for name in _OTHER_LOCKS)
_TURN = re.compile(r"(.+?)-undo-[0-9a-z]+")


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


async def recover(
    vm: Connection,
    choice: Choice = Choice.UNDO,
    *,
    dry_run: bool = False,
    tell: Callable[[str, Step], None] | None = None,
) -> list[Recovery]:
    """Undo, or carry on, what controllers that died left in a VM. See `VM.recover`."""
    if not dry_run:
        try:
            await ownership.ask(vm.monitor)
        except UnsupportedError:
            # There may be nothing to do, and that can be said. What there is would be done to
            # images that are somebody else's: a change that is undone writes, too.
            found = await recover(vm, choice, dry_run=True)
            if any(step.verb != "leave" for one in found for step in one.steps):
                raise
            return found
    graph = await vm.graph()  # before the locks: what has no lock by then has no controller
    holders, unread = await _holders(vm, graph)
    dead = {
        holder.run: holder
        for name, holder in holders.items()
        if name.startswith(LOCKS) and holder.is_dead()
    }
    records = [(holder, record_of(holder)) for holder in dead.values()]
    # First, for until then the guest is held by a drain; and before polling is touched (K9).
    if not dry_run:
        await _finalize_pivots(vm, graph, [record for _, record in records if record])
    async with AsyncExitStack() as guard:
        if not dry_run:
            await guard.enter_async_context(polling.unpolled(vm.monitor, wake=True))
        found = _left_alone(holders)
        for holder, record in records:
            if record is None:
                continue
            if dry_run:
                found.append(_foresee(record, graph, choice, await identify(vm)))
            else:
                found.append(await _recover_change(vm, holder, record, choice, tell))
        if not unread:  # whose lock cannot be read, of that nothing else tells what it left
            found += await _recover_orphans(vm, graph, holders, dry_run=dry_run, tell=tell)
        found += await _recover_locks(vm, holders, dry_run=dry_run)
        if not unread:
            unread += await _forget_journals(vm, found, dry_run=dry_run)
    _refuse_the_unknown(holders)
    if unread:
        raise unread[0]
    return found


async def _holders(
    vm: Connection, graph: BlockGraph
) -> tuple[dict[str, Holder], list[RecordError]]:
    """Return who holds each lock of ours in the VM, by the lock's name, and those unreadable."""
    found: dict[str, Holder] = {}
    unread: list[RecordError] = []
    for name in await lock.names(vm.monitor):
        if name in _OTHER_LOCKS or name.startswith((LOCKS, AHEAD_LOCKS, polling.GUARDS, *_TURNS)):
            holder = await lock.read(vm.monitor, name)
            try:
                if isinstance(holder, str):
                    raise lock.unreadable(name, holder)
                if holder is not None and holder.is_dead():
                    _check_details(name, holder, graph)
            except RecordError as error:
                unread.append(error)
            else:
                if holder is not None:
                    found[name] = holder
    return found, unread


def _check_details(name: str, dead: Holder, graph: BlockGraph) -> None:
    """See that what a dead holder says of its work can be read, and is all.

    :raise RecordError: it cannot.
    """
    if _TURN.fullmatch(name):
        return  # it was about to undo what another one left, whose lock is there too
    if dead.is_idle and not name.startswith(LOCKS):
        return
    if name == NBD_LOCK:
        dead.says(ServerUse, name)
    elif name.startswith(AHEAD_LOCKS):
        dead.says(Watch, name)
    elif name.startswith(polling.GUARDS):
        dead.says(polling.Guard, name)
    elif name != polling.LOCK:  # which says nothing
        check_all_said(dead, record_of(dead, name), graph, name)


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
    return name == polling.LOCK or name.startswith(polling.GUARDS)


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


async def _finalize_pivots(vm: Connection, graph: BlockGraph, records: Iterable[Record]) -> None:
    for record in records:
        job = graph.job(record.job)
        if record.pivot and job is not None and job.status == "pending":
            follower = Job(vm.monitor, job.id, job.type)
            try:
                with contextlib.suppress(CommandError):  # another recovery was faster
                    try:
                        journal = find(record, await identify(vm))
                    except RecordError:
                        # Nothing can be marked: let what stands there be true. Without a word
                        # the guest stays on the overlay, which has it all.
                        if _says_pivoted(record):
                            await undisturbed(follower.finalize())
                        else:
                            await undisturbed(follower.cancel())
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
    planned = list(steps(record, graph, choice, made))
    planned += [Step("remove", name, "the lock of a controller that died") for name in record.locks]
    return Recovery(record.describe(), record.run, tuple(planned), took_effect(record, graph))


async def _recover_change(
    vm: Connection,
    holder: Holder,
    record: Record,
    choice: Choice,
    tell: Callable[[str, Step], None] | None,
) -> Recovery:
    told: list[Step] = []

    def note(step: Step) -> None:
        told.append(step)
        if tell is not None:
            tell(record.describe(), step)

    done: bool | None = None
    if choice is Choice.CONTINUE:
        journal = find(record, await identify(vm))
        if journal is None and record.pivot and (await vm.graph()).job(record.job) is not None:
            raise _without_journal(record)
        change = Change(vm, record)
        if not await change.adopt(holder, journal):
            return Recovery(record.describe(), record.run, (), None)
        if record.job:
            note(Step("follow", record.job, "it is carried on to its end"))
            await carry_on(vm, change)
        else:
            await undisturbed(settle(vm, record, change.journal, choice, note))
            await undisturbed(change.end())
    else:
        await make_way(vm, record.locks, note)
    done = took_effect(record, await vm.graph())
    return Recovery(record.describe(), record.run, tuple(told), done)


def _without_journal(record: Record) -> RecordError:
    return RecordError(
        f"the journal of {record.describe()} is not in {printable(state_directory())}: what tells "
        "which image is newest if QEMU dies could not be kept, so the job is not carried on",
        standing="nothing was touched",
        remedy="run this where it was begun, as the same user and with the same QMPBLOCK_STATE; or "
        "undo it: qmpblock recover ADDRESS",
        run=record.run,
    )


async def _recover_orphans(
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
    found: dict[str, dict[str, list[str]]] = {}
    for kind, names in (("job", [job.id for job in graph.jobs]), ("node", list(graph.nodes))):
        for name in names:
            match = _NAME.fullmatch(name)
            if match and match[1] not in runs and not (kind == "node" and graph.users(name)):
                found.setdefault(match[1], {"job": [], "node": []})[kind].append(name)
    done = []
    for run, names_of in found.items():
        jobs = sorted(names_of["job"], key=lambda name: "-create-" in name)
        record = Record(
            run=run,
            operation="change",
            vm=me,
            devices=("",),
            names=("a disk",),
            locks=(),
            job=jobs[0] if jobs else "",
            helpers=tuple(jobs[1:]),
            pivot=bool(jobs) and jobs[0].endswith("-pivot"),
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


async def _recover_locks(
    vm: Connection, holders: dict[str, Holder], *, dry_run: bool
) -> list[Recovery]:
    """Undo dead exports and watchers, and remove what is left of interrupted recoveries."""
    done = []
    names: dict[str, Holder] = {}
    for name, holder in holders.items():
        if not holder.is_dead():
            continue
        turn = _TURN.fullmatch(name)
        if turn or name in _OTHER_LOCKS or record_of(holder) is None:
            names.setdefault(turn[1] if turn else name, holder)
    for name, holder in names.items():
        step = Step("remove", name, "the lock of a controller that died, and what it guards")
        done.append(Recovery(f"use of {name}", holder.run, (step,), None))
        if dry_run:
            continue
        if _is_of_polling(name):
            # The guard around this recovery has taken it over by now, if there is an iothread.
            left = await lock.read(vm.monitor, name)
            if isinstance(left, Holder) and left.is_dead():
                await lock.release(vm.monitor, name)
            continue
        me = Holder.me(Change.new_run())

        async def undo(dead: Holder, name: str = name) -> None:
            if name == NBD_LOCK:
                await undo_dead_run(vm.monitor, dead, vm.stall, name)
            elif name.startswith(AHEAD_LOCKS):
                await disarm_dead(vm, dead)
            else:
                await undo_dead_change(vm, dead)

        await lock.acquire(vm.monitor, name, me, undo, stall=vm.stall)
        await lock.release(vm.monitor, name)
    return done


async def _forget_journals(
    vm: Connection, done: list[Recovery], *, dry_run: bool
) -> list[RecordError]:
    """Remove journals of this VM whose change has no lock any more: it ended.

    Returns an error for each that cannot be read.

    :param done: is added to.
    """
    me = await identify(vm)
    held = {holder.run for holder in (await _holders(vm, await vm.graph()))[0].values()}
    found = survey()
    unread = [error for error in found.unreadable if error.run not in held and is_of(error, me)]
    for journal in found.journals:
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
