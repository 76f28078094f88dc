"""Locks that live inside QEMU, so that they outlive a controller that is killed.

A lock is a `secret` object: `object-add` is atomic across all monitors of a VM, and `qom-get`
tells every other controller who holds it (design.md, safety rule 9). A holder is dead when
it ran in this boot and this process namespace and its process is gone; then, and only then,
the next controller undoes what it left and takes the lock over.

Taking over is itself raced for, with an object named after the dead holder's run::

    lock held by dead run R
      add lock-undo-R            only one controller can
      read lock again            still R? (an earlier winner may have finished meanwhile)
      undo what R left
      delete lock, delete lock-undo-R

A winner that is killed on the way is a dead holder of `lock-undo-R`, and is treated the
same, one name further: undoing is idempotent.

Of several locks that one controller takes together the first says what they are for, and the
others where that is said: QEMU takes in byte by byte what a lock says, and it is much. So the first
is taken before the others, and given back after them; whoever reads one of these reads it, too.

QEMU may lie, and name another dead holder each time. So of dead ones only so many are undone
for one lock, also because some of it is done under `undisturbed`, where no signal ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qmpblock.cancellation import undisturbed
from qmpblock.errors import (
    BusyError,
    CommandError,
    DisconnectedError,
    RecordError,
    StalledError,
    printable,
)
from qmpblock.host.processes import boot_id, pid_namespace, start_time
from qmpblock.names import is_holders_run, is_ours, is_turn_of, turn_name
from qmpblock.peerjson import read_json
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import duplicate_object, no_object, not_found
from qmpblock.versioned import UnreadableError, plain, stamped, unstamped
from qmpblock.versioned import read as read_fields

__all__ = [
    "Holder",
    "abandon",
    "acquire",
    "acquire_all",
    "adopt",
    "holders",
    "look",
    "names",
    "read",
    "release",
    "release_all",
    "unreadable",
    "update",
]

T = TypeVar("T")
_FORMAT = 2  # of what says where another lock's details are; else 1, which any version reads
_POLL = 0.05  # seconds between looks at a lock that a live controller holds
_READINGS = 4  # of a lock whose details another one has, and that changes hands meanwhile
_MOST_DEAD = 64  # holders of one lock, and of the turns to undo them, that are undone for it
_FEW_DEAD = 4  # of them also when that takes longer than the stall limit
_MOST_TURNS = 256  # that are looked at when a lock is swept
_MOST_OBJECTS = 4096  # that bear our name; two for each disk

# Runs of this process that lost their monitor before they could clean up: the process is
# alive, the run is not.
_abandoned: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """The controller that holds a lock.

    :ivar run: the run id in the names of all that it makes.
    :ivar start: the process's start time in clock ticks since boot (proc(5)): with the
        pid, it names one process and never another.
    :ivar boot: the boot id of its machine; with `pids`, the namespace its pid counts in.
    :ivar details: what whoever undoes its work needs to know.
    :ivar at: the lock that says so; empty: this one does, as any that was read (`read`).
    :ivar more: what another version wrote that this one does not know.
    """

    run: str
    host: str
    pid: int
    start: int
    boot: str
    pids: str
    details: Mapping[str, Any]
    at: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def me(cls, run: str, **details: Any) -> Holder:
        """Describe this process."""
        pid = os.getpid()
        return cls(
            run=run,
            host=socket.gethostname(),
            pid=pid,
            start=start_time(pid) or 0,
            boot=boot_id(),
            pids=pid_namespace(),
            details=details,
        )

    @classmethod
    def from_text(cls, text: str) -> Holder:
        """Read what `text` wrote, of whatever version.

        :raise UnreadableError: it is not one of ours, or not one that this version understands.
        """
        try:
            data = read_json(text.encode())
        except ValueError:
            raise UnreadableError(
                f"it is no JSON, so an object not of ours, or damaged: {printable(text, 60)}"
            ) from None
        holder = read_fields(cls, unstamped(data, _FORMAT))
        if not is_holders_run(holder.run):
            raise UnreadableError("its run is none")
        if holder.at and not is_ours(holder.at):
            raise UnreadableError("what it is for a lock is to say that is none of ours")
        return holder

    def dead(self) -> Holder:
        """Return what says the same of a controller that anybody takes for a dead one."""
        return replace(self, start=0)

    def text(self) -> str:
        """Return the lock object's data."""
        said = {name: one for name, one in plain(self).items() if name != "at"}
        if self.at:
            said |= {"format": _FORMAT, "at": self.at}
        return json.dumps(stamped(said), separators=(",", ":"))

    def beside(self, name: str) -> Holder:
        """Return what another lock of this holder says: where the details are."""
        return replace(self, details={}, at=name)

    def says(self, kind: type[T], name: str = "") -> T:
        """Read its details: what it says of its work.

        :param kind: a dataclass (`qmpblock.versioned`); `name`: of the lock, where it is known.
        :raise RecordError: it is not what this version understands.
        """
        try:
            return read_fields(kind, self.details)
        except UnreadableError as error:
            raise unreadable(name or f"of {self}", error, self.run) from None

    @property
    def is_idle(self) -> bool:
        """Whether it says nothing of any work: it only held the lock, to undo what another left.

        It had the lock when that was done, so there is nothing to be undone after it.
        """
        return not self.details

    def is_elsewhere(self) -> bool:
        """Whether it ran where this process cannot see whether it still does."""
        return self.boot != boot_id() or self.pids != pid_namespace()

    def is_dead(self) -> bool:
        """Whether the controller is certainly gone; False also where that cannot be told."""
        if self.is_elsewhere():
            return False
        if self.pid == os.getpid() and self.run in _abandoned:
            return True
        return start_time(self.pid) != self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)} (run {printable(self.run)})"


Undo = Callable[[Holder], Awaitable[None]]


@dataclass
class _Patience:
    """How much more is done to have one lock: until when it is waited for, which dead undone."""

    deadline: float
    dead: int = 0

    @property
    def late(self) -> bool:
        return asyncio.get_running_loop().time() >= self.deadline

    def found_dead(self, name: str, holder: Holder) -> None:
        """Count a dead holder.

        :raise BusyError: there were too many.
        """
        self.dead += 1
        if self.dead > _MOST_DEAD or (self.dead > _FEW_DEAD and self.late):
            raise BusyError(
                f"each time that {printable(name)} in this VM is to be taken over, another "
                f"controller that died holds it, now {holder}: {self.dead} of them",
                standing="what they left was undone as far as it could be told",
                remedy="no crash of ours leaves that: see who else uses this VM's monitors, and "
                "whether its QEMU is what it should be. If all of them are certainly dead, remove "
                f'the locks: object-del {{"id": "{printable(name)}"}}',
            )


async def acquire(
    monitor: Monitor,
    name: str,
    me: Holder,
    undo: Undo,
    *,
    stall: float,
    remedy: str | None = None,
) -> None:
    """Take the lock, waiting while a live controller holds it.

    Cancelling leaves the lock as it was, or free; undoing that has begun is completed.

    :param name: the object's id.
    :param undo: removes everything that a dead holder left; must be idempotent.
    :param stall: seconds to wait for a holder that does not go away.
    :param remedy: what to do when it does not.
    :raise BusyError: it did not, the message names the holder; or dead ones do without end.
    :raise RecordError: it cannot be read who holds it.
    """
    patience = _Patience(asyncio.get_running_loop().time() + stall)
    await _acquire(monitor, name, me, undo, patience, remedy)


async def acquire_all(
    monitor: Monitor,
    names: Sequence[str],
    me: Holder,
    undo: Undo,
    *,
    stall: float,
    remedy: str | None = None,
) -> None:
    """Take several locks, of which the first says what this holder says, as by `acquire`.

    The first one before the others: of those who want the same ones, whoever has it has them all.
    Failed or cancelled, none is taken. `release_all` gives them back, the first one last.

    :raise Error: as of `acquire`.
    """
    if not names:
        return
    first, *rest = names
    await acquire(monitor, first, me, undo, stall=stall, remedy=remedy)
    taken = [first]
    try:
        if rest:
            refused = await _add_all(monitor, rest, me.beside(first))
            taken += [name for name in rest if name not in refused]
            for name in refused:
                await acquire(monitor, name, me.beside(first), undo, stall=stall, remedy=remedy)
                taken.append(name)
    except BaseException:
        await undisturbed(release_all(monitor, reversed(taken)))
        raise


async def _add_all(monitor: Monitor, names: Sequence[str], me: Holder) -> list[str]:
    """Add locks at once; return those that are there. Failed or cancelled, none is added."""
    adding = asyncio.ensure_future(_add(monitor, names, me))
    try:
        return await asyncio.shield(adding)
    except asyncio.CancelledError:
        await undisturbed(_take_back(monitor, names, adding))
        raise


async def _acquire(
    monitor: Monitor, name: str, me: Holder, undo: Undo, patience: _Patience, remedy: str | None
) -> None:
    while await _add_all(monitor, [name], me):
        holder = await read(monitor, name)
        if isinstance(holder, Holder) and holder.is_dead():
            patience.found_dead(name, holder)
            await _take_over(monitor, name, holder, me, undo, patience)
            continue
        late = patience.late
        if isinstance(holder, str) and late:
            raise unreadable(name, holder)
        if holder is not None and late:
            raise _held(name, holder, remedy)
        if holder is not None:
            await asyncio.sleep(_POLL)


def _held(name: str, holder: Holder | str, remedy: str | None) -> BusyError:
    return BusyError(
        f"another controller holds {name} in this VM: {holder}",
        standing="nothing was changed",
        remedy=remedy
        or "wait for it; if it is certainly dead, remove its exports "
        "(query-block-exports, block-export-del), then its lock: "
        f'object-del {{"id": "{name}"}}',
    )


async def look(monitor: Monitor, name: str) -> Holder | None:
    """Refuse where `acquire` would that does not wait; nothing is changed.

    :return: the dead holder whose work would be undone; None: nobody holds the lock.
    :raise BusyError: a live controller does.
    :raise RecordError: it cannot be read who does.
    """
    holder = await read(monitor, name)
    if isinstance(holder, str):
        raise unreadable(name, holder)
    if holder is None or holder.is_dead():
        return holder
    raise _held(name, holder, None)


def abandon(run: str) -> None:
    """Declare a run of this process dead: it cannot reach QEMU to release what it holds."""
    _abandoned.add(run)


async def release(monitor: Monitor, name: str) -> None:
    """Give the lock back. Idempotent."""
    try:
        await monitor.execute("object-del", {"id": name})
    except CommandError as error:
        if not not_found(error):
            raise


async def release_all(monitor: Monitor, names: Iterable[str]) -> None:
    """Give locks back, in this order. Idempotent."""
    for said in await monitor.each(*(("object-del", {"id": name}) for name in names)):
        if isinstance(said, CommandError) and not not_found(said):
            raise said


async def update(monitor: Monitor, name: str, me: Holder) -> None:
    """Have the lock, which is this holder's, say what it says now."""
    await monitor.execute(
        "qom-set", {"path": f"/objects/{name}", "property": "data", "value": me.text()}
    )


async def adopt(monitor: Monitor, name: str, dead: Holder, me: Holder, undo: Undo) -> bool:
    """Become the holder of a dead one's lock, what it left untouched; False if it is gone.

    :raise BusyError: another controller is about to do the same, or to undo.
    """
    turn = turn_name(name, dead.run)
    await acquire(monitor, turn, me, undo, stall=0)
    return await undisturbed(_adopt_in_turn(monitor, name, turn, dead, me))


async def _adopt_in_turn(monitor: Monitor, name: str, turn: str, dead: Holder, me: Holder) -> bool:
    try:
        now = await read(monitor, name)
        if not isinstance(now, Holder) or now != dead:
            return False
        # What another version wrote there, and this one does not know, stays.
        kept = replace(me, details={**now.details, **me.details}, more=now.more)
        await update(monitor, name, kept)
        return True
    finally:
        await release(monitor, turn)


async def _take_over(
    monitor: Monitor, name: str, dead: Holder, me: Holder, undo: Undo, patience: _Patience
) -> None:
    turn = turn_name(name, dead.run)
    await _acquire(monitor, turn, me, undo, patience, None)
    await undisturbed(_undo_in_turn(monitor, name, turn, dead, undo))


async def _undo_in_turn(monitor: Monitor, name: str, turn: str, dead: Holder, undo: Undo) -> None:
    try:
        now = await read(monitor, name)
        if isinstance(now, Holder) and now.run == dead.run:
            await undo(dead)
            await release(monitor, name)
    finally:
        await release(monitor, turn)


async def _sweep(monitor: Monitor, names: Iterable[str], objects: Any) -> None:
    """Remove turns whose holders died just before they gave them back. Only under the locks.

    :param objects: that were in the VM under them.
    """
    for name in names:
        turns = [one["name"] for one in objects if is_turn_of(one["name"], name)]
        for turn in turns[:_MOST_TURNS]:
            holder = await read(monitor, turn)
            if isinstance(holder, Holder) and holder.is_dead():
                await release(monitor, turn)


async def _take_back(
    monitor: Monitor, names: Sequence[str], adding: asyncio.Future[list[str]]
) -> None:
    refused = await adding
    await release_all(monitor, [name for name in reversed(names) if name not in refused])


async def _add(monitor: Monitor, names: Sequence[str], me: Holder) -> list[str]:
    """Add locks, and sweep them; return those that are there. Failed, none is added.

    Where QEMU says nothing, they may be there: as those of a run that is dead.
    """
    text = me.text()
    asked = [("object-add", {"qom-type": "secret", "id": name, "data": text}) for name in names]
    try:
        *said, objects = await monitor.each(*asked, ("qom-list", {"path": "/objects"}))
    except (DisconnectedError, StalledError):
        abandon(me.run)
        raise
    bad = [
        one
        for one in (*said, objects)
        if isinstance(one, CommandError) and not duplicate_object(one)
    ]
    both = list(zip(names, said, strict=True))
    added = [name for name, one in both if not isinstance(one, CommandError)]
    try:
        if not bad:
            await _sweep(monitor, added, objects)
            return [name for name, one in both if isinstance(one, CommandError)]
    except BaseException:
        await release_all(monitor, reversed(added))
        raise
    await release_all(monitor, reversed(added))
    raise bad[0]


async def holders(monitor: Monitor, wanted: Callable[[str], bool]) -> dict[str, Holder | str]:
    """Return who holds each lock, or why that cannot be read, by the lock's name.

    :param wanted: tells by its name whether a lock is of interest.
    :raise BusyError: see `names`.
    """
    held = {}
    for name in filter(wanted, await names(monitor)):
        holder = await read(monitor, name)
        if holder is not None:
            held[name] = holder
    return held


async def names(monitor: Monitor) -> list[str]:
    """Return the names of all objects in the VM that bear our name: locks, and what is like them.

    :raise BusyError: there are more than controllers of ours can have made.
    """
    objects = await monitor.execute("qom-list", {"path": "/objects"})
    ours = [one["name"] for one in objects if is_ours(one["name"])]
    if len(ours) > _MOST_OBJECTS:
        raise BusyError(
            f"{len(ours)} objects in this VM bear our name, more than we can have made",
            standing="none of them was touched",
            remedy="see who else uses its monitors, and whether its QEMU is what it should be",
        )
    return ours


async def data_of(monitor: Monitor, name: str) -> str | None:
    """Return what a `secret` object says; None where there is none of that name."""
    try:
        text = await monitor.execute("qom-get", {"path": f"/objects/{name}", "property": "data"})
    except CommandError as error:
        if no_object(error):
            return None
        raise
    return text if isinstance(text, str) else json.dumps(text)


async def read(monitor: Monitor, name: str) -> Holder | str | None:
    """Return the holder, why it cannot be read, or None if the lock is free by now."""
    for _ in range(_READINGS):
        text = await data_of(monitor, name)
        if text is None:
            return None
        try:
            holder = Holder.from_text(text)
            if not holder.at:
                return holder
            return _completed(holder, await data_of(monitor, holder.at))
        except UnreadableError as error:
            why = str(error)
        if await data_of(monitor, name) == text:  # it was not given back meanwhile
            return why
    return "it says something else each time that it is read"


def _completed(holder: Holder, first: str | None) -> Holder:
    """Return the holder of a lock that says where its details are, with these.

    :raise UnreadableError: they are not there.
    """
    said = None if first is None else Holder.from_text(first)
    if said is None or said.at or said.run != holder.run:
        raise UnreadableError(f"what it is for {printable(holder.at)} is to say, and does not")
    return replace(holder, details=said.details, at="")


def unreadable(name: str, why: object, run: str = "") -> RecordError:
    """Say that a lock, which is ours by its name, cannot be read: its holder may be at work."""
    return RecordError(
        f"the lock {printable(name)} in this VM is ours by its name and cannot be read: {why}",
        standing="nothing of what it guards was touched",
        remedy="have the qmpblock that wrote it, or a newer one, recover: qmpblock recover "
        "ADDRESS. Only if that is impossible, the controller is certainly dead, and nothing of it "
        "is left (qmpblock jobs ADDRESS, qmpblock disks ADDRESS), remove the lock: object-del"
        + ("" if " " in name else f' {{"id": "{printable(name)}"}}'),
        run=run,
    )
