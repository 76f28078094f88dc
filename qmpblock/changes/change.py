"""Change: the frame around everything that changes a disk, from its lock to its last trace.

::

    begin                                    end
    1. no iothread polls (polling.py)        1. let QEMU migrate again
    2. lock each disk (objects in QEMU)      2. remove the journal
    3. QEMU migrates nothing from now on     3. iothreads poll again
    4. write the journal, fsynced            4. release the locks

Before it begins every verb refuses, in the same order, what must not be::

    the images are another QEMU's: migration    ownership.ask, again in `begin` and last
    what dead controllers of ours left goes     make_way
    a job is at work on the disk                chainplan.check_idle
    it is for reading only                      writable.check_disk
    an image is corrupt, or was never closed    writable.check_sound
    somebody else uses a layer                  layeruse, sharedfiles, filelocks
    no name leads back to an image              backingname, backingproof; again last
    the device cannot be held                   heldio
    a manager owns the chain                    ownership.ask_for_change: the one that can be waived

It begins only where the images are this QEMU's (`qmpblock.qemu.ownership`), and they stay so, for
QEMU refuses to migrate meanwhile (`qmpblock.changes.nomigration`). The lock outlasts the journal on
both sides: a journal without a lock belongs to a QEMU that is gone. What lies between is undone, or
carried on, by one piece of code, whoever does it: this controller after an error or a cancellation,
the next one after this one was killed, or `qmpblock recover` (`qmpblock.changes.settle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from qmpblock.cancellation import undisturbed
from qmpblock.changes.journal import Journal
from qmpblock.changes.leftovers import OWN_REMEDY, clear, undo_dead_change
from qmpblock.changes.nomigration import allow_migration, forbid_migration
from qmpblock.changes.record import Record
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    DisconnectedError,
    Error,
    NoRoomError,
    StalledError,
    shell_words,
)
from qmpblock.graph.model import BlockGraph
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import is_running
from qmpblock.qemu import lock, ownership, polling
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.lock import Holder

__all__ = ["Change"]

RecordT = TypeVar("RecordT", bound=Record, covariant=True)

_log = logging.getLogger(__name__)
_RECONNECT = 5.0  # seconds for the monitor to come back after its connection was cut
_ENDING = 2.0  # seconds from QEMU's last word to the end of its process


class Change(Generic[RecordT]):
    """One change to a VM's disks. `begin`, do it, then `end` or `undo`.

    :param record: what it intends; its run id is in the names of all that it makes.
    :param beside: the image beside which its journal is kept too.
    :param journaled: whether it makes anything that outlives QEMU. If not, its locks, whose
        data is the record, are all that whoever undoes it needs.
    """

    def __init__(
        self, vm: Connection, record: RecordT, *, beside: Path | None = None, journaled: bool = True
    ) -> None:
        self.vm = vm
        self.record = record
        self.journal: Journal | None = None
        self.held = False  # whether QEMU refuses to migrate meanwhile
        self.settled: BlockGraph | None = None  # as it was when all was undone
        self._beside = beside
        self._journaled = journaled
        self._locked: list[str] = []
        self._unpolled = False
        self._allows = False  # whether that was taken back before its end

    def holder(self) -> Holder:
        """Return what the locks say.

        What is empty is left out: QEMU takes a command in byte by byte, 8 us each.
        """
        empty = {one.name: one.default for one in fields(self.record)}
        said = {k: v for k, v in self.record.as_json().items() if empty.get(k, MISSING) != v}
        return Holder.me(self.record.run, record=said)

    async def begin(self) -> None:
        """Take the locks, hold the VM where it is, write the journal. Cancelling leaves nothing.

        What a dead controller left on one of the disks is undone first.

        :raise UnsupportedError: the images are not this QEMU's, or not for long.
        :raise BusyError: another controller is at work on one of the disks.
        :raise Error: the journal cannot be written.
        """
        await ownership.ask(self.vm.monitor)
        await self._hold_polling()
        try:
            locks = sorted(self.record.locks)
            await lock.acquire_all(
                *(self.vm.monitor, locks, self.holder(), self._undo_dead),
                stall=0,
                remedy=OWN_REMEDY,
            )
            self._locked = locks
            self.held = await undisturbed(forbid_migration(self.vm.monitor, self.record.run))
            await ownership.ask(self.vm.monitor)
            if self._journaled:
                self.journal = self._create_journal()
        except BusyError as error:
            await undisturbed(self.end())
            error.standing = UNTOUCHED
            raise
        except DisconnectedError:
            lock.abandon(self.record.run)
            await undisturbed(self._let_go_polling())
            raise
        except BaseException as error:
            await undisturbed(self.end())
            if isinstance(error, StalledError):
                self._say_left(error)
            raise

    async def _hold_polling(self) -> None:
        await polling.hold(self.vm.monitor)
        self._unpolled = True

    async def _let_go_polling(self) -> None:
        if self._unpolled:
            self._unpolled = False
            await polling.let_go(self.vm.monitor)

    def _create_journal(self) -> Journal | None:
        try:
            opened = OpenFiles(self.vm.monitor.peer_pid).ids() if self._beside is not None else ()
            return Journal.create(self.record, self._beside, opened)
        except NoRoomError as error:
            if self.record.needs_journal:
                raise
            # Whatever dies, such a chain is whole, and starts from where it did: to have no
            # journal says so, too. And it may be what is to make room.
            _log.warning("%s; without one, that this change was broken off will not be said", error)
            return None

    async def adopt(self, dead: Holder, journal: Journal | None) -> bool:
        """Take a dead controller's change over as it is; False if somebody else did.

        :param journal: of the change. Where it has none it gets none: what the lock says, somebody
            in QEMU may have said.
        """
        adopted = False
        await self._hold_polling()
        try:
            for name in sorted(self.record.locks):
                holder = await lock.read(self.vm.monitor, name)
                # Who adopts keeps the run: another one may have been faster, and lives.
                if isinstance(holder, Holder) and holder.run == dead.run and holder.is_dead():
                    adopted |= await lock.adopt(
                        self.vm.monitor, name, holder, self.holder(), self._undo_dead
                    )
            if adopted:
                self._locked = list(self.record.locks)
                self.held = await undisturbed(forbid_migration(self.vm.monitor, self.record.run))
                self.journal = journal
        except BaseException:
            await undisturbed(self._let_go_polling())
            raise
        if not adopted:
            await undisturbed(self._let_go_polling())
        return adopted

    async def leave(self, **said: Any) -> None:
        """Leave it as it is, for whoever adopts it, or undoes it, as that of a dead controller.

        QEMU goes on refusing to migrate.

        :param said: fields of the record that have another value from now on.
        """
        self.record = replace(self.record, **said)
        self._allows = False
        await forbid_migration(self.vm.monitor, self.record.run)
        for name in self._locked:
            await lock.update(self.vm.monitor, name, self.holder().dead())
        await self._let_go_polling()

    async def allow_migration(self) -> None:
        """Have QEMU migrate from now on, while this goes on: it is for that."""
        await allow_migration(self.vm.monitor, self.record.run)
        self._allows = True

    async def end(self) -> None:
        """Remove the journal, release the locks: the change is done, or undone. Idempotent.

        Where that cannot be, because QEMU does not answer, say, the run counts as dead from then
        on: whoever comes next takes away what is left of it.
        """
        try:
            try:
                # QEMU may die at any command: the journal must not go before.
                if self._locked and not self._allows:
                    await allow_migration(self.vm.monitor, self.record.run)
                if self.journal is not None:
                    self.journal.remove()
            finally:
                # Before the locks: who comes next sees these, if this process is killed here.
                await self._let_go_polling()
            await lock.release_all(self.vm.monitor, reversed(self._locked))
        except BaseException as error:
            lock.abandon(self.record.run)
            if isinstance(error, StalledError):
                self._say_left(error)
            raise
        self._locked.clear()

    async def undo(self) -> bool:
        """Undo the change as far as it can be, and end it; return whether it is done after all.

        That is so where the guest had already moved on when it was given up. Where it cannot
        be undone now, because QEMU does not answer, say, the run counts as dead from then on:
        whoever comes next undoes it. The error says so.
        """
        try:
            async with polling.unpolled(self.vm.monitor):
                graph = await settle(self.vm, self.record, self.journal, Choice.UNDO)
                self.settled = graph
                await self.end()
        except DisconnectedError as error:
            await self.after_disconnect(error)
            raise
        except BaseException as error:
            lock.abandon(self.record.run)
            await undisturbed(self._let_go_polling())
            if isinstance(error, Error):
                self._say_left(error)
            raise
        return self.record.took_effect(graph) is True

    @asynccontextmanager
    async def or_undo(
        self, undone: Callable[[], str], done: Callable[[], str] | None = None
    ) -> AsyncIterator[None]:
        """Undo the change where the body fails or is cancelled, and only then.

        The error is raised all the same; where it does not say what stands now, it is told.

        :param undone: what stands once it is undone.
        :param done: what stands where it turned out to be done (`took_effect`).
        """
        try:
            yield
        except DisconnectedError as error:
            await undisturbed(self.after_disconnect(error))
            raise
        except BaseException as error:
            took_effect = await undisturbed(self.undo())
            if isinstance(error, Error) and error.standing is None:
                error.standing = done() if took_effect and done else undone()
            raise

    def _say_left(self, error: Error) -> None:
        error.standing = (
            f"left in the VM: the lock {', '.join(self.record.locks)} and what it is for"
        )
        error.remedy = f"run: qmpblock recover {shell_words([self.vm.monitor.address])}"

    async def _undo_dead(self, dead: Holder) -> None:
        await undo_dead_change(self.vm, dead)

    # when the connection is gone

    async def after_disconnect(self, error: DisconnectedError) -> None:
        """See what can still be done when the monitor's connection was lost in the middle.

        If QEMU lives, connect again and undo. If it is gone, do what `qmpblock recover IMAGE`
        would. Sets the error's words accordingly.
        """
        from qmpblock.changes.imagerecovery import recover_journal

        monitor, record = self.vm.monitor, self.record
        await self._let_go_polling()
        pid, gone = record.vm.pid, False
        deadline = asyncio.get_running_loop().time() + _ENDING
        while pid and not gone:
            gone = not is_running(pid, record.vm.start, record.vm.boot)
            if gone or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        if gone:
            error.standing = "QEMU has ended"
            error.remedy = f"run: qmpblock recover {shell_words(record.images[:1])}"
            if not self._journaled:
                error.standing = "QEMU has ended, and all that was ours with it"
                error.remedy = None
            elif self.journal is not None:
                with contextlib.suppress(Error):
                    verdict = await recover_journal(self.journal)
                    error.standing = f"QEMU has ended. {verdict.describe()}"
                    error.remedy = None
            return
        lock.abandon(record.run)
        self._say_left(error)
        with contextlib.suppress(Error, OSError):
            async with Connection.open(
                monitor.address, self.vm.nbd, greeting_timeout=_RECONNECT, stall=monitor.stall
            ) as again:
                # Of this process, but given up: so it is dead, with all that it had in the VM.
                await clear(again)
                done = record.took_effect(await again.graph())
                error.standing = "connected again; " + (
                    "the change turned out to be done, and what was left of it is removed"
                    if done
                    else "the change was undone, and nothing of ours is left in the VM"
                )
                error.remedy = None
