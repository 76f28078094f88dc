"""Recovery: after a controller died (`recover`), or QEMU did (`recover_images`).

While QEMU lives, everything that a dead controller left can be read from QEMU itself: the
lock's data says what it was about, the graph and the jobs how far it got. Once QEMU is gone,
the journals on this host say what the images' headers cannot: which image holds the newest
data.

A pivot that is pending comes first, before any lock is taken: it holds the guest's I/O (K5).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock import lock, ownership, polling
from qmpblock.ahead import Watch, disarm_dead
from qmpblock.cancellation import undisturbed
from qmpblock.chainjobs import carry_on
from qmpblock.change import (
    AHEAD_LOCKS,
    LOCKS,
    Change,
    check_all_said,
    find_journal,
    identify,
    make_way,
    record_of,
    settle,
    undo_dead_change,
)
from qmpblock.driving import pivot
from qmpblock.errors import (
    BusyError,
    CommandError,
    Error,
    NotFoundError,
    RecordError,
    ToolError,
    UnsupportedError,
    printable,
)
from qmpblock.export import LOCK as NBD_LOCK
from qmpblock.graph import BlockGraph
from qmpblock.hostprocess import is_running
from qmpblock.job import Job
from qmpblock.journal import PIVOTED, Journal
from qmpblock.jsonname import from_text
from qmpblock.lock import Holder
from qmpblock.nbdserver import ServerUse, undo_dead_run
from qmpblock.opened import is_nested
from qmpblock.qemuimg import QemuImg, blockdev
from qmpblock.record import Record
from qmpblock.recoveryplan import Choice, ImageVerdict, Step, image_verdict, steps, took_effect
from qmpblock.survey import is_of, journals, survey

if TYPE_CHECKING:
    from qmpblock.vm import VM

__all__ = ["ImageRecovery", "Recovery", "recover", "recover_images", "recover_journal"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"qmpblock-([0-9a-f]{8})-(.+)")
_OTHER_LOCKS = (NBD_LOCK, polling.LOCK)
_TURNS = tuple(f"{name}-undo-" for name in _OTHER_LOCKS)
_INSIDE = re.compile(r"/proc/\d+/root(/.+)", re.DOTALL)
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
    vm: VM,
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
                found.append(_foresee(record, graph, choice))
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


async def _holders(vm: VM, graph: BlockGraph) -> tuple[dict[str, Holder], list[RecordError]]:
    """Return who holds each lock of ours in the VM, by the lock's name, and those unreadable."""
    found: dict[str, Holder] = {}
    unread: list[RecordError] = []
    for item in await vm.monitor.execute("qom-list", {"path": "/objects"}):
        name = str(item.get("name", ""))
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


async def _finalize_pivots(vm: VM, graph: BlockGraph, records: Iterable[Record]) -> None:
    for record in records:
        job = graph.job(record.job)
        if record.pivot and job is not None and job.status == "pending":
            follower = Job(vm.monitor, job.id, job.type)
            try:
                with contextlib.suppress(CommandError):  # another recovery was faster
                    try:
                        journal = find_journal(record)
                    except RecordError:
                        # Nothing can be marked: the guest stays on the overlay, which has it all.
                        await undisturbed(follower.cancel())
                    else:
                        await undisturbed(pivot(journal, follower))
            finally:
                follower.end()


def _foresee(record: Record, graph: BlockGraph, choice: Choice) -> Recovery:
    journal = find_journal(record)
    made = list(journal.made()) if journal is not None else []
    planned = list(steps(record, graph, choice, made))
    planned += [Step("remove", name, "the lock of a controller that died") for name in record.locks]
    return Recovery(record.describe(), record.run, tuple(planned), took_effect(record, graph))


async def _recover_change(
    vm: VM,
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
        beside = Path(record.home) if record.home else None
        change = Change(vm, record, beside=beside if beside and beside.exists() else None)
        if not await change.adopt(holder, find_journal(record)):
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


async def _recover_orphans(
    vm: VM,
    graph: BlockGraph,
    holders: dict[str, Holder],
    *,
    dry_run: bool,
    tell: Callable[[str, Step], None] | None,
) -> list[Recovery]:
    """Remove what bears our name but has no lock (somebody removed it): the names suffice."""
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
            vm=await identify(vm),
            devices=("",),
            names=("a disk",),
            locks=(),
            job=jobs[0] if jobs else "",
            helpers=tuple(jobs[1:]),
            pivot=bool(jobs) and jobs[0].endswith("-pivot"),
            nodes=tuple(sorted(names_of["node"], key=len)),
        )
        for journal in journals():
            if journal.record.run == run:
                known = journal.record.nodes
                others = tuple(node for node in record.nodes if node not in known)
                record = replace(journal.record, nodes=known + others)
        if dry_run:
            done.append(_foresee(record, graph, Choice.UNDO))
            continue
        told: list[Step] = []

        def note(step: Step, record: Record = record, told: list[Step] = told) -> None:
            told.append(step)
            if tell is not None:
                tell(record.describe(), step)

        journal_ = find_journal(record)
        await undisturbed(settle(vm, record, journal_, Choice.UNDO, note))
        done.append(Recovery(record.describe(), run, tuple(told), None))
    return done


async def _recover_locks(vm: VM, holders: dict[str, Holder], *, dry_run: bool) -> list[Recovery]:
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


async def _forget_journals(vm: VM, done: list[Recovery], *, dry_run: bool) -> list[RecordError]:
    """Remove journals of this VM whose change has no lock any more: it ended.

    Returns an error for each that cannot be read.

    :param done: is added to.
    """
    me = await identify(vm)
    held = {holder.run for holder in (await _holders(vm, await vm.graph()))[0].values()}
    found = survey()
    unread = [error for error in found.unreadable if error.run not in held and is_of(error, me)]
    for journal in found.journals:
        same = journal.record.vm
        if (same.pid, same.start, same.boot, same.uuid) != (me.pid, me.start, me.boot, me.uuid):
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


# QEMU is gone


@dataclass(frozen=True)
class ImageRecovery:
    """What a change that QEMU's end interrupted means for the images.

    :ivar what: what it was about, for people.
    :ivar removed: files that were (in a dry run: would be) removed.
    :ivar opened: the options that open the image to start from, where it is another one than
        before, and its file name and format do not suffice; else empty.
    """

    what: str
    run: str
    verdict: ImageVerdict
    removed: tuple[str, ...]
    opened: str = ""

    def describe(self) -> str:
        """Say what is to be done, for people."""
        text = f"start the VM from {_list(self.verdict.start)}: {self.verdict.why}."
        if self.opened:
            text += f" Its name does not suffice; it was open as {printable(self.opened, 4000)}."
        if self.verdict.stale:
            text += f" Never use or commit {_list(self.verdict.stale)} again: stale."
        for overlay, base in self.verdict.commit:
            text += f" {printable(overlay)} is committed into {printable(base)} and removed."
        if self.removed:
            text += f" Removed: {_list(self.removed)}."
        return text


def _list(files: Sequence[str]) -> str:
    return ", ".join(printable(file) for file in files)


async def recover_images(
    images: Sequence[str | os.PathLike[str]], *, dry_run: bool = False
) -> list[ImageRecovery]:
    """Say which image to start from, after QEMU died in the middle of a change of ours.

    Finds the change's journal in the state directory or beside the image. Overlays that
    nothing was ever written to are removed, then the journal; no image is changed.

    :param images: any image of the chain; the active one is best.
    :param dry_run: change nothing.
    :return: one for each change that was interrupted; none where the images are safe.
    :raise NotFoundError: there is no such image.
    :raise RecordError: a journal that may be about them cannot be read; nothing was touched.
    :raise BusyError: the QEMU that the change was made in still runs.
    """
    names = [os.path.realpath(image) for image in images]
    for image, name in zip(images, names, strict=True):
        if not Path(name).exists():
            raise NotFoundError(f"there is no image {printable(os.fspath(image))}")
    seen = survey(tuple(names))
    for error in seen.unreadable:
        if error.files is None or _is_about(error.files, names):
            raise error
    for path, why in seen.distrusted:
        _log.warning("the journal %s is not believed: %s", printable(path), why)
    found = []
    for journal in seen.journals:
        record = journal.record
        if not _is_about((*record.images, *record.files), names):
            continue
        if is_running(record.vm.pid, record.vm.start, record.vm.boot):
            raise BusyError(
                f"the VM still runs (process {record.vm.pid}) in which {record.describe()} was "
                "not finished",
                standing="nothing was touched",
                remedy=f"run: qmpblock recover {printable(record.vm.monitor)}",
            )
        if not record.vm.pid:  # a TCP monitor: the locks on the images tell
            await _check_unused(record)
        found.append(await recover_journal(journal, dry_run=dry_run))
    return found


def _is_about(files: Iterable[str], names: Iterable[str]) -> bool:
    files = tuple(files)
    # What only the VM saw under its name lies here under another one, which ends in that.
    inside = [match[1] for file in files if (match := _INSIDE.fullmatch(file))]
    known = {os.path.realpath(file) for file in files if not _INSIDE.fullmatch(file)}
    return any(name in known or any(name.endswith(end) for end in inside) for name in names)


async def _check_unused(record: Record) -> None:
    """See that no QEMU has the images open for writing.

    :raise BusyError: one has.
    """
    for file in filter(os.path.exists, (*record.images, *record.files)):
        if await QemuImg().in_use(file):
            raise BusyError(
                f"{printable(file)} is in use: the VM in which {record.describe()} was not "
                "finished still runs, or another has been started",
                standing="nothing was touched",
                remedy=f"run: qmpblock recover {printable(record.vm.monitor)}",
            )


async def recover_journal(journal: Journal, *, dry_run: bool = False) -> ImageRecovery:
    """Do what `recover_images` does, for one journal whose QEMU is gone.

    :raise ToolError: an overlay cannot be looked at; nothing was removed.
    """
    record = journal.record
    empty = {}
    formats: dict[str, str] = {}
    for entry in journal.entries:  # a file that was made anew has no header yet
        formats.pop(str(entry.get("made")), None)
        if "created" in entry:
            formats[str(entry["created"])] = str(entry.get("format", ""))
    for file, identity in journal.made().items():
        with contextlib.suppress(FileNotFoundError):
            status = Path(file).lstat()
            if (status.st_dev, status.st_ino) == identity:
                empty[file] = file not in formats or await _holds_nothing(file, formats[file])
    verdict = image_verdict(record, journal.entries, empty)
    pivoting = record.operation == "commit" and record.pivot and not journal.pivoted
    if not journal.complete and (
        # Where the image is not on this host, all is in the one journal that there is.
        verdict.commit or (pivoting and os.path.lexists(record.home))
    ):
        raise Error(
            f"whether {printable(record.top_file)} or {printable(record.base_file)} is newer "
            "cannot be told: the journal that says so, beside the image, cannot be read",
            standing="nothing was touched",
            remedy=f"look for {printable(record.home)}.qmpblock-{record.run}.journal, which "
            "must belong to this user or root, and be writable for nobody else",
        )
    if verdict.commit:
        _check_same_files(record)
    if not dry_run:
        for overlay, base in verdict.commit:
            fmt = formats.get(overlay) or "qcow2"
            await _commit(record, overlay, fmt, base)
            # Killed here, and the VM started: the overlay must not be committed again.
            with contextlib.suppress(Error):  # no room: then it goes the sooner
                journal.mark(**{PIVOTED: True})
            Path(overlay).unlink()
        for file in verdict.unused:
            with contextlib.suppress(FileNotFoundError):
                Path(file).unlink()
        journal.remove()
    moved = record.operation == "commit" and verdict.start == (record.base_file,)
    how = record.base_opened if moved else ""
    return ImageRecovery(record.describe(), record.run, verdict, verdict.unused, how)


def _check_same_files(record: Record) -> None:
    """See that what an overlay would be committed into is what it was taken of.

    By inode only: a device may have another number after the host was started again.

    :raise Error: it was replaced since, by a copy or a backup say; nothing was touched.
    """
    for file, inode in record.written:
        try:
            same = Path(file).stat().st_ino == inode
        except FileNotFoundError:
            same = False
        if not same:
            raise Error(
                f"{printable(file)} is not the file any more that {printable(record.top_file)} was "
                "made over: it has been removed or replaced since. The overlay holds only what the "
                "guest wrote last, and in another image that would be corruption",
                standing=f"nothing was touched; {printable(record.top_file)} is kept",
                remedy="put the file itself back at its name, and run this again. If only an exact "
                "copy of it is left, one that was made after QEMU had ended: qemu-img rebase -u "
                "-F FMT -b COPY OVERLAY, then qemu-img commit OVERLAY",
            )


async def _commit(record: Record, overlay: str, fmt: str, base: str) -> None:
    tool = QemuImg()
    how = from_text(record.base_opened) or None
    if how is None:
        # Refuses a chain in which a format would have to be guessed.
        await tool.chain(base, record.base_format)
    # An interrupted job may have left another name, or none.
    await tool.rebase(overlay, fmt, base, record.base_format)
    hidden = how is not None and is_nested(how)
    try:
        if hidden:  # or the name would count, and what is said besides would contradict it
            await tool.rebase(overlay, fmt, "", "")
        await tool.commit(overlay, fmt, how)
    except ToolError as error:
        if hidden:
            with contextlib.suppress(ToolError):
                await tool.rebase(overlay, fmt, base, record.base_format)
        if "key-secret" in error.stderr:
            error.standing = f"nothing was touched; {printable(overlay)} holds the newest data"
            error.remedy = (
                "the images are encrypted, and we have no key. Start the VM from "
                f"{printable(overlay)}, which lies on {printable(base)}, and commit it there: "
                "qmpblock commit ADDRESS DISK --base @1"
            )
        elif "No space left" in error.stderr:
            error.standing = (
                f"nothing is lost: {printable(overlay)} holds what the guest wrote last, and "
                f"{printable(base)} the rest"
            )
            error.remedy = "make room there, and run this again before the VM is started"
        raise


async def _holds_nothing(file: str, fmt: str) -> bool:
    """Whether an overlay holds nothing; False where that cannot be told: it is kept then."""
    try:
        seen = await QemuImg().map(blockdev(fmt, file), [fmt])
    except ToolError as error:
        if "lock" in error.stderr:
            raise
        return False  # encrypted, say
    return not seen.where(present=True)
