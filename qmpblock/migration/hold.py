"""Hold: that two VMs are one migration's, said in both of them and in its journal.

A lock at either side keeps away all else of ours, and tells whoever finds it after a crash which
VM is at the other side (`qmpblock.migration.record`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    Error,
    MonitorError,
    RecordError,
    StalledError,
)
from qmpblock.host.processes import pid_namespace
from qmpblock.migration.journal import MigrationJournal
from qmpblock.migration.record import MigrationRecord, Settings, read_record
from qmpblock.migration.sights import process_of
from qmpblock.migration.states import ORDER, Phase, Side
from qmpblock.names import MIGRATION_LOCK
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder
from qmpblock.versioned import UnreadableError

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["Hold", "holder_of", "record_of", "side_of"]

_RECORD = "migration"
_SIDE = "side"
_ANSWER = 2.0  # seconds for a word from a QEMU that is well
_WRITTEN = frozenset(one.enters for one in ORDER if one.enters is not None)

_log = logging.getLogger(__name__)


class Hold:
    """One migration's hold of its two VMs: `begin`, `write`, `enter` each phase, `end`.

    :ivar record: what it says.
    """

    def __init__(self, source: Connection, destination: Connection, record: MigrationRecord):
        self.record = record
        self._source = source
        self._destination = destination
        self._journal: MigrationJournal | None = None
        self._held: list[Connection] = []

    @classmethod
    async def of(
        cls,
        source: Connection,
        destination: Connection,
        run: str,
        source_had: Settings,
        destination_had: Settings = Settings(),  # noqa: B008  # frozen
    ) -> Hold:
        """Say which VMs, and what is changed of their settings; touch nothing."""
        here, there = await asyncio.gather(process_of(source), process_of(destination))
        record = MigrationRecord(
            run,
            here,
            there,
            pid_namespace(),
            source_had,
            destination_had,
        )
        return cls(source, destination, record)

    async def begin(self) -> None:
        """Take the lock at both sides. Cancelling leaves nothing.

        :raise BusyError: one of them is another migration's; says how to recover a dead one's.
        """
        try:
            async with task_group() as group:
                group.create_task(self._take(self._source, Side.SOURCE))
                group.create_task(self._take(self._destination, Side.DESTINATION))
        except BaseException:
            await undisturbed(self.end())
            raise

    async def _take(self, vm: Connection, side: Side) -> None:
        me = holder_of(self.record, self.record.run, side)
        await lock.acquire(vm.monitor, MIGRATION_LOCK, me, _refuse, stall=0)
        self._held.append(vm)

    async def write(self, phase: Phase = Phase.CHECKED) -> None:
        """Write the journal. Cancelling waits until it is written, for `end` to remove it.

        :param phase: that is entered next.
        :raise Error: it cannot be written.
        """
        await undisturbed(self._write(phase))

    async def _write(self, phase: Phase) -> None:
        self._journal = await asyncio.to_thread(MigrationJournal.create, self.record, phase)

    def enter(self, phase: Phase, *, stopped: bool = False) -> None:
        """Write that a phase is entered, before what it stands for is done.

        Those that the two sides tell themselves are not written: some are entered while the guest
        stands. `handed` cannot fail: arbiter and mark say it too, and there is no way back.

        :param stopped: whether the guest had stopped, which is to stay so.
        :raise Error: it cannot be written.
        """
        if phase not in _WRITTEN or self._journal is None:
            return
        try:
            self._journal.enter(phase, stopped=stopped)
        except Error as error:
            if phase is not Phase.HANDED:
                raise
            _log.warning("%s; should both VMs end now, nothing tells who had the guest", error)

    async def end(self) -> None:
        """Let go: there is nothing left to recover. Idempotent.

        A side that is gone has taken its lock with it; in one that is silent it stays, and is a
        dead one's.

        :raise Error: a lock could not be released, or the journal not be removed.
        """
        failed: Error | None = None
        while self._held:
            vm = self._held.pop()
            try:
                async with asyncio.timeout(_ANSWER):
                    await lock.release(vm.monitor, MIGRATION_LOCK)
            except (TimeoutError, MonitorError, StalledError):
                lock.abandon(self.record.run)
            except Error as error:
                failed = error
        if failed is not None:
            raise failed
        if self._journal is not None:
            self._journal.remove()
            self._journal = None

    async def let_go(self, *, settled: bool) -> None:
        """End it, or leave what is left to be recovered, by this process too.

        :param settled: whether nothing is left.
        """
        if not settled:
            lock.abandon(self.record.run)
            return
        try:
            await self.end()
        except Error as error:
            _log.warning("%s", error)


def holder_of(record: MigrationRecord, run: str, side: Side) -> Holder:
    """Describe this process, as the one that has a migration in hand.

    :param run: of the migration; a recovery has one of its own.
    :param side: whose lock is to say it.
    """
    return Holder.me(run, **{_RECORD: record.as_json(), _SIDE: side.value})


def side_of(holder: Holder) -> Side | None:
    """Return whose lock it is; None where an older version did not say."""
    said = holder.details.get(_SIDE)
    return next((side for side in Side if side.value == said), None)


def record_of(holder: Holder) -> MigrationRecord:
    """Return what the holder of such a lock is about.

    :raise RecordError: it cannot be read.
    """
    try:
        return read_record(holder.details.get(_RECORD))
    except UnreadableError as error:
        raise lock.unreadable(MIGRATION_LOCK, error, holder.run) from None


async def _refuse(dead: Holder) -> None:
    try:
        what = record_of(dead).describe()
    except RecordError:
        what = f"migration (run {dead.run})"
    raise BusyError(
        f"a {what} was broken off, and its controller is gone",
        standing=UNTOUCHED,
        remedy="recover it first: qmpblock recover ADDRESS",
    )
