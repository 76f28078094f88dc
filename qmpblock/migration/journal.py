"""The journal of a migration: how far it is, on stable storage before what it says is done.

It lies in the state directory, where only we can write (`qmpblock.host.statedirectory`): the record
as JSON in its first line, then one line for each phase that was entered. A last line that is torn
was never acted upon. What happened is otherwise read from the two QEMUs themselves; it says what
cannot be seen there any more once one of them is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qmpblock.changes.journalfile import DistrustedError, JournalFile
from qmpblock.changes.linechain import lines_of, sealed
from qmpblock.errors import UNTOUCHED, Error, NoRoomError, RecordError, printable
from qmpblock.host.statedirectory import StateDirectory, state_directory
from qmpblock.migration.record import MigrationRecord, read_record
from qmpblock.migration.states import Phase
from qmpblock.names import is_migration, migration_in_state
from qmpblock.versioned import UnreadableError, stamped, unstamped

__all__ = ["MigrationJournal", "journals"]

_PHASE, _STOPPED = "phase", "stopped"


class MigrationJournal:
    """Made by `create`, found by `journals`.

    All I/O is synchronous: a phase is on stable storage when the call returns.

    :ivar phase: which was entered last.
    :ivar stopped: whether it says that the guest had stopped, which is to stay so.
    """

    def __init__(
        self,
        record: MigrationRecord,
        file: JournalFile,
        lines: bytes,
        phase: Phase,
        *,
        stopped: bool = False,
    ):
        self.record = record
        self.phase = phase
        self.stopped = stopped
        self._file = file
        self._lines = lines

    @classmethod
    def create(cls, record: MigrationRecord, phase: Phase = Phase.CHECKED) -> MigrationJournal:
        """Write the record where it is to be found after a crash.

        :param phase: that is entered next, if that is known: two words for one fsync.
        :raise NoRoomError: there is no room for it; nothing is left of it.
        :raise Error: it cannot be written; nothing is left of it.
        """
        lines = sealed(None, b"", stamped(record.as_json()))
        if phase is not Phase.CHECKED:
            lines += _entered(lines, phase)
        name = migration_in_state(record.source, record.run)
        try:
            state = StateDirectory.proven(make=True)
            assert state is not None  # it was made
            file = JournalFile.create(state, name, lines)
        except OSError as error:
            raise Error(
                f"cannot write the journal {printable(error.filename)}: {error.strerror}",
                standing=UNTOUCHED,
                remedy="set QMPBLOCK_STATE to a directory that this user may write to, and nobody "
                "else",
            ) from None
        if file is None:
            raise NoRoomError(
                f"there is no room for a migration's journal in {printable(state_directory())}",
                standing=UNTOUCHED,
                remedy="make some kilobytes free there, or set QMPBLOCK_STATE to another directory",
            )
        return cls(record, file, lines, phase)

    def enter(self, phase: Phase, *, stopped: bool = False) -> None:
        """Say that what a phase stands for is about to be done.

        :param stopped: whether the guest had stopped; once said it stays so.
        :raise Error: it cannot be written; then it must not be done.
        """
        if phase is self.phase:
            return
        stopped = stopped or self.stopped
        lines = self._lines + _entered(self._lines, phase, stopped=stopped)
        try:
            self._file.become(lines)
        except OSError as error:
            raise Error(
                f"cannot write to the journal {printable(self._file.path)}: {error.strerror}",
                remedy="make room there",
            ) from None
        self._lines = lines
        self.phase, self.stopped = phase, stopped

    def remove(self) -> None:
        """Remove it: there is nothing left to recover. Idempotent.

        :raise Error: it cannot be removed.
        """
        try:
            self._file.remove()
        except OSError as error:
            raise Error(
                f"cannot remove the journal {printable(self._file.path)}: {error.strerror}",
                standing="nothing else is left of the migration",
                remedy="remove it",
            ) from None


def journals() -> Iterator[MigrationJournal]:
    """Yield the journal of every migration that was not brought to its end.

    :raise RecordError: one is ours by its name, and cannot be read.
    """
    try:
        state = StateDirectory.proven()
        names = state.names() if state is not None else []
    except OSError:
        return  # where there is none that counts, nothing was written
    for name in filter(is_migration, names):
        assert state is not None
        try:
            file = JournalFile.open(state, name)
        except DistrustedError:
            continue
        data = b"" if file is None else file.read()
        # One whose first line is torn belongs to a migration that had not begun.
        if file is not None and b"\n" in data:
            yield _parsed(file, data)


def _parsed(file: JournalFile, data: bytes) -> MigrationJournal:
    lines = lines_of(data)
    try:
        first, *rest = (_object(line) for line in lines.splitlines())
        record = read_record(unstamped(first))
        phase, stopped = Phase.CHECKED, False
        for entry in rest:
            if _PHASE in entry:
                phase, stopped = Phase(entry[_PHASE]), bool(entry.get(_STOPPED))
    except (UnreadableError, ValueError) as error:
        raise RecordError(
            f"the journal {printable(file.path)} is ours by its name and cannot be read: {error}",
            standing=UNTOUCHED,
            remedy="have the qmpblock that wrote it, or a newer one, recover. If it is damaged: it "
            "tells of a migration that was not brought to its end; see on which side the guest "
            "runs before anything is done, then remove it",
            path=file.path,
        ) from None
    return MigrationJournal(record, file, lines, phase, stopped=stopped)


def _entered(lines: bytes, phase: Phase, *, stopped: bool = False) -> bytes:
    """Return the line that follows these."""
    return sealed(None, lines, {_PHASE: phase.value} | ({_STOPPED: True} if stopped else {}))


def _object(line: bytes) -> dict[str, Any]:
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise UnreadableError("a line of it is no JSON object")
    return entry
