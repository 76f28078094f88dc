"""Journal: what a change intends, and how far it is, on stable storage before it happens.

A change is described by one `Record`. It is kept in two places with different lives:

- in the data of the change's lock, an object inside QEMU (`qmpblock.qemu.lock`): it outlives the
  controller, and ends with QEMU. Whoever is in that QEMU may have put it there;
- in a journal in the state directory (`qmpblock.host.statedirectory`), where only we can write. It
  outlives both, and it alone says what there is to do to files. A change after which the image to
  start from is another one (an active commit) also has a copy of it beside the active image, as
  `IMAGE.qmpblock-RUN.journal`, so that whoever finds the image finds it. Others may write to that
  directory: the copy is believed only where a key of this installation proves it
  (`qmpblock.changes.linechain`), or it says nothing but what the one in the state directory says.

Where the image's file system is full, the one in the state directory stands alone, and says so;
an empty file `IMAGE.qmpblock-RUN.elsewhere` tells other hosts. Where the state directory's is,
the one beside the image does. What either will need besides is reserved when it is made, so that
a mark, and all undoing, works with no byte free.

A journal is a text file: the record as JSON in the first line, then one line an entry, each
written and fsynced before what it announces. A last line that is torn was never acted upon.
What happened is otherwise read from QEMU itself, or from the images: the journal says only
what cannot be seen there.

Format 1 had no proofs, and said beside the image alone whether a pivot had happened. Such a
journal is read, and its copy believed as it was then, where the state directory has it, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmpblock.changes.journalfile import FULL, LIMIT, DistrustedError, JournalFile
from qmpblock.changes.linechain import lines_of, proving, sealed
from qmpblock.changes.operations import read_record
from qmpblock.changes.record import Record, VMIdentity, pivoted, worth_keeping
from qmpblock.errors import UNTOUCHED, Error, NoRoomError, RecordError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.statedirectory import (
    InsecureError,
    OpenDirectory,
    StateDirectory,
    state_directory,
)
from qmpblock.names import (
    elsewhere_beside,
    is_of_vm,
    journal_beside,
    journal_in_state,
    run_of_journal,
)
from qmpblock.versioned import UnreadableError, stamped, unstamped

__all__ = [
    "FORMAT",
    "DistrustedError",
    "Journal",
    "discard_torn",
    "home_path",
    "state_directory",
]

#: The newest format of journals; that of locks is another.
FORMAT = 2

_log = logging.getLogger(__name__)


class Journal:
    """The journal of one change. Make a new one with `create`; `survey` finds others.

    All I/O is synchronous: an entry is on stable storage when the call returns, and nothing
    else of this process may run between the last entry and what it announces.

    :ivar record: what the change intends.
    :ivar files: where it lies; what the first one says counts.
    :ivar entries: what was added since, oldest first.
    :ivar lines: the text of the record and of these entries, where it was read.
    :ivar form: the format that it is in.
    :ivar alone: whether one of format 1 lies in the state directory alone although it has a home.
    """

    def __init__(
        self,
        record: Record,
        files: tuple[JournalFile, ...],
        entries: list[dict[str, Any]],
        *,
        lines: bytes = b"",
        form: int = FORMAT,
        alone: bool = False,
        key: bytes | None = None,
    ):
        self.record = record
        self.files = files
        self.entries = entries
        self.lines = lines
        self.form = form
        self.alone = alone
        self._key = key
        self.held: list[float] = []  # seconds that each pivot of this process held the guest

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files' paths, for people."""
        return tuple(file.path for file in self.files)

    @classmethod
    def create(
        cls,
        record: Record,
        beside: Path | None = None,
        opened: Collection[FileId] = (),
    ) -> Journal:
        """Write the record where it is to be found after a crash.

        Where one of the two places has no room, the other one suffices.

        :param beside: the image beside which it is also kept.
        :param opened: what QEMU has open, among which that image must be; none where that cannot
            be seen.
        :raise NoRoomError: there is no room for it; nothing is left of it.
        :raise Error: it cannot be written; nothing is left of it.
        """
        journal = cls(record, (), [])
        try:
            journal._write_first(beside, opened)
        except OSError as error:
            journal.remove()
            raise _cannot_begin(error, beside) from None
        if not journal.files:
            raise NoRoomError(
                "there is no room for the journal of this change in "
                f"{printable(state_directory())}"
                + (f", nor beside {printable(beside)}" if beside is not None else ""),
                standing="nothing was changed",
                remedy="set QMPBLOCK_STATE to a directory on a file system with some kilobytes "
                "free, that outlives a crash of this host; recover looks there only if it is set "
                "then, too",
            )
        return journal

    def _write_first(self, beside: Path | None, opened: Collection[FileId]) -> None:
        """Write the first line of each file for which there is room.

        :raise OSError: it cannot be written.
        """
        state, home = _open_state(), None
        if beside is not None:
            home = _open_home(beside, opened)
            if state is not None:
                self._key = _key_of(state)
        said = stamped(self.record.as_json()) | {"format": FORMAT}
        self.lines = sealed(self._key, b"", said)
        if state is not None:
            record = self.record
            self._add_file(state, journal_in_state(record.vm, record.devices, record.run))
        inside = bool(self.files)
        if home is None or beside is None:
            return
        if self._key is not None:  # without one, nothing would prove it
            self._add_file(home, journal_beside(beside.name, self.record.run))
        if inside and len(self.files) == 1:
            self._mark_elsewhere(home)
        elif self.files and not inside:
            where = state_directory()
            _log.warning("no room in %s: the journal lies beside the image alone", where)

    def _add_file(self, directory: OpenDirectory, name: str) -> None:
        file = JournalFile.create(directory, name, self.lines)
        if file is not None:
            self.files += (file,)

    def _mark_elsewhere(self, directory: OpenDirectory) -> None:
        home = self.record.home
        _log.warning(
            "no room beside %s: the journal lies in %s alone. If QEMU and qmpblock die, run on "
            "this host: qmpblock recover %s",
            printable(home),
            printable(self.paths[0].parent),
            printable(home),
        )
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # without it, only other hosts know less
            name = elsewhere_beside(Path(home).name, self.record.run)
            os.close(os.open(name, flags, 0o600, dir_fd=directory.fd))
            directory.sync()

    def add(self, **entry: Any) -> None:
        """Write an entry everywhere.

        :raise Error: it cannot be written; the disk is full, say.
        """
        before = self._read()
        self._write(before, before + sealed(self._key, before, entry))
        self.entries.append(entry)

    def mark(self, **entry: Any) -> None:
        """Write an entry while the guest waits for it: in the time of the slower of two fsyncs.

        :raise Error: it cannot be written; the disk is full, say.
        """
        self.add(**entry)

    def restart(self) -> None:
        """Forget the entries, where nothing that they tell of is there any more.

        So a change of many slices keeps a short journal.

        :raise Error: it cannot be written.
        """
        before = self._read()
        self._write(before, before[: before.index(b"\n") + 1])
        self.entries.clear()

    def _read(self) -> bytes:
        first = self.files[0]
        try:
            return lines_of(first.read())
        except OSError as error:
            raise _cannot_write(first.path, error) from None

    def _write(self, before: bytes, lines: bytes) -> None:
        """Have every file hold these lines: side by side, for each waits for its disk."""
        failed: list[tuple[Path, OSError]] = []

        def write(file: JournalFile, text: bytes) -> None:
            try:
                file.become(text)
            except OSError as error:
                failed.append((file.path, error))

        threads = [threading.Thread(target=write, args=(file, lines)) for file in self.files[1:]]
        for thread in threads:
            thread.start()
        write(self.files[0], lines)
        for thread in threads:
            thread.join()
        if failed:
            path, error = failed[0]
            for file in self.files:
                write(file, before)  # it was not acted upon
            raise _cannot_write(path, error)

    @property
    def complete(self) -> bool:
        """Whether every entry is here: in format 1, marks were beside the image alone."""
        home = self.record.home
        return (
            self.form > 1
            or self.alone
            or not home
            or any(path.name == home_path(self.record).name for path in self.paths)
        )

    @property
    def pivoted(self) -> bool:
        """Whether the base, not the top, is the image to trust."""
        return pivoted(self.entries)

    def made(self) -> dict[str, tuple[int, int]]:
        """Return the image files that the change made, with device and inode."""
        files = {}
        for entry in self.entries:
            made = entry.get("made")
            if isinstance(made, str) and made in self.record.files:
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    files[made] = (int(entry["dev"]), int(entry["ino"]))
        return files

    def kept(self) -> set[str]:
        """Return those of them that another copy can go on from."""
        return worth_keeping(self.entries) & set(self.made())

    def remove(self) -> None:
        """Remove it: the change has ended. Idempotent."""
        for file in self.files:
            with contextlib.suppress(OSError):
                file.remove()
        if self.record.home and self.files:
            with contextlib.suppress(OSError):
                _remove_elsewhere(self.record)

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read one file of a journal.

        :return: None if there is none, if it was torn before it began, and if it is not
            believed: it lies where others can write, and no key of ours proves it.
        :raise RecordError: it is ours, and cannot be read.
        """
        state = StateDirectory.proven()
        inside = state is not None and path.parent == state.path
        try:
            directory = state if state is not None and inside else OpenDirectory.at(path.parent)
            file = JournalFile.open(directory, path.name)
        except (DistrustedError, FileNotFoundError):
            return None
        journal = None if file is None else cls.parse(file, file.read())
        if journal is None or inside:
            return journal
        return journal if journal.is_proven(state.keys() if state is not None else ()) else None

    @classmethod
    def parse(cls, file: JournalFile, data: bytes) -> Journal | None:
        """Read what a journal's file holds, which may be anything; see `load`."""
        if _is_torn(data):
            return None
        path = file.path
        lines = lines_of(data)
        texts = data.split(b"\n")[:-1]
        first: Any = None
        record = None
        try:
            first = _parsed(texts, 0, len(data))
            form = first.get("format", 1)
            said = unstamped(first, FORMAT)
            alone = said.pop("alone", False) is True
            record = read_record(said)
            record.check_journaled()
            entries = [_parsed(texts, number) for number in range(1, len(texts))]
        except UnreadableError as error:
            raise RecordError(
                f"the journal {printable(path)} is ours by its name and cannot be read: {error}",
                standing=UNTOUCHED,
                remedy=_REMEDY,
                path=path,
                run=run_of_journal(path.name),
                files=_files_of(record.as_json() if record else first),
            ) from None
        return cls(record, (file,), entries, lines=lines, form=form, alone=alone)

    def is_proven(self, keys: Iterable[bytes]) -> bool:
        """Whether one of these keys proves what it says; what is added is sealed by that one."""
        self._key = proving(keys, self.lines)
        return self._key is not None

    def take_copy(self, copy: Journal, keys: Sequence[bytes]) -> bool:
        """Take one that lies beside the image as a second file of this one, in the state directory.

        :return: False if it is not that.
        """
        if copy.record != self.record or copy.form != self.form:
            return False
        if self.form == 1:
            if copy.alone != self.alone:
                return False
            self.files = (*copy.files, *self.files)  # it has every entry, in their order
            self.entries, self.lines = copy.entries, copy.lines
            return True
        proven = copy.is_proven(keys)
        if not self.lines.startswith(copy.lines) and not (
            proven and copy.lines.startswith(self.lines)  # its last line was not acted upon
        ):
            return False
        self.files += copy.files
        self._key = copy._key
        return True

    def take_torn(self, file: JournalFile, data: bytes) -> bool:
        """Take a file whose first line was never complete as a second file of this one."""
        if self.form == 1 or not self.lines.startswith(data):
            return False
        self.files += (file,)
        return True


_REMEDY = (
    "have the qmpblock that wrote it, or a newer one, recover: qmpblock recover IMAGE. If it is "
    "damaged: it describes a change that was not finished; find out which of the images is the "
    "newest before any of them is used, then remove it"
)


def _is_torn(data: bytes) -> bool:
    """Whether a journal's first line was never complete: it is what a record begins with.

    Its controller was killed while it wrote it, and had done nothing yet.
    """
    return not data or (data.startswith(b"{") and b"\n" not in data and b"\0" not in data)


def _parsed(lines: list[bytes], number: int, size: int = 0) -> dict[str, Any]:
    if size > LIMIT:
        raise UnreadableError("it is longer than any of ours")
    try:
        entry = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UnreadableError(f"its line {number + 1} is damaged")
    entry.pop("mac", None)
    return entry


def _files_of(data: Any) -> tuple[str, ...] | None:
    """Return the image files that a record of any version is about; None if it does not say."""
    if not isinstance(data, Mapping):
        return None
    lists = [data.get("images"), data.get("files")]
    if not all(isinstance(one, list | tuple) for one in lists) or not lists[0]:
        return None
    return tuple(str(file) for one in lists for file in one or ())


def discard_torn(vm: VMIdentity, run: str) -> None:
    """Remove a journal in the state directory whose first line was never complete.

    :param vm: the process that we see, not one that anybody claims.
    """
    with contextlib.suppress(OSError, RecordError, DistrustedError):
        state = StateDirectory.proven()
        for name in state.names() if state is not None else ():
            if not is_of_vm(name, vm) or run_of_journal(name) != run:
                continue
            assert state is not None
            file = JournalFile.open(state, name)
            if file is not None and file.writable and _is_torn(file.read()):
                file.remove()


def _open_state() -> StateDirectory | None:
    """Open the state directory, made if it is not there; None where there is no room for it."""
    try:
        return StateDirectory.proven(make=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return None


def _open_home(image: Path, opened: Collection[FileId]) -> OpenDirectory:
    """Open the directory of an image, and see that it is the one that QEMU has open there."""
    try:
        directory = OpenDirectory.at(image.parent)
        if opened and FileId.of(os.stat(image.name, dir_fd=directory.fd)) not in opened:
            raise InsecureError(image, "is not the file that QEMU has open")
    except OSError as error:
        error.filename = image
        raise
    return directory


def _key_of(state: StateDirectory) -> bytes | None:
    """Return the key of this installation; None where there is no room to make one."""
    try:
        return state.key()
    except OSError as error:
        if error.errno not in FULL:
            raise
        return None


def _remove_elsewhere(record: Record) -> None:
    home = Path(record.home)
    name = elsewhere_beside(home.name, record.run)
    directory = OpenDirectory.at(home.parent)
    status = directory.status(name)
    if status is None or status.st_size or status.st_uid not in (0, os.geteuid()):
        return
    file = FileId.of(status)
    if file is not None and directory.remove(name, file):
        directory.sync()


def _cannot_begin(error: OSError, beside: Path | None) -> Error:
    home = beside is not None and Path(str(error.filename)).parent == beside.parent
    return Error(
        f"cannot write the journal {printable(error.filename)}: {error.strerror}",
        standing="nothing was changed",
        remedy="the directory of the image must be writable: what tells which image to start from "
        "after a crash is kept there"
        if home
        else "set QMPBLOCK_STATE to a directory that this user may write to, and nobody else",
    )


def _cannot_write(path: Path, error: OSError) -> Error:
    return Error(
        f"cannot write to the journal {printable(path)}: {error.strerror}",
        remedy="make room there",
    )


def home_path(record: Record) -> Path:
    """Return where the journal of a change that has a home lies beside its image."""
    home = Path(record.home)
    return home.with_name(journal_beside(home.name, record.run))
