"""Journal: what a change intends, and how far it is, on stable storage before it happens.

A change is described by one `Record`. It is kept in two places with different lives:

- in the data of the change's lock, an object inside QEMU (`qmpblock.lock`): it outlives the
  controller, and ends with QEMU;
- in a journal on the controller's host, which outlives both. A change after which the
  image to start from is another one (an active commit) also keeps its journal beside the
  active image, as `IMAGE.qmpblock-RUN.journal`, so that whoever finds the image finds it.

Where the image's file system is full, the one in the state directory stands alone, and says so;
an empty file `IMAGE.qmpblock-RUN.elsewhere` tells other hosts. Where the state directory's is,
the one beside the image does. What either will need besides is reserved when it is made, so that
a mark, and all undoing, works with no byte free.

A journal is a text file: the record as JSON in the first line, then one line an entry, each
written and fsynced before what it announces. A last line that is torn was never acted upon.
What happened is otherwise read from QEMU itself, or from the images: the journal says only
what cannot be seen there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qmpblock.errors import Error, NoRoomError, RecordError, printable
from qmpblock.fallocate import UNSUPPORTED, keep_size
from qmpblock.record import Record, VMIdentity
from qmpblock.versioned import UnreadableError, stamped, unstamped

__all__ = [
    "PIVOTED",
    "DistrustedError",
    "Journal",
    "Record",
    "VMIdentity",
    "content",
    "discard_torn",
    "home_path",
    "is_elsewhere",
    "of_vm",
    "pivoted",
    "run_of",
    "state_directory",
]

#: The key of the entry that says whether the base is the image to trust now.
PIVOTED = "pivoted"

_NAME = re.compile(r".*?[.-](?:qmpblock-)?([0-9a-f]{8})\.(?:journal|elsewhere)", re.DOTALL)
ELSEWHERE = ".elsewhere"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE = 2048  # bytes that the entries of one slice, or the marks of a pivot, will need
_log = logging.getLogger(__name__)
_LIMIT = 16 << 20  # bytes of a journal that are read; one of ours has some kilobytes


def state_directory() -> Path:
    """Return where journals are kept (design.md, safety rule 9); it need not exist."""
    if named := os.environ.get("QMPBLOCK_STATE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/qmpblock")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "qmpblock"


class Journal:
    """The journal of one change. Make a new one with `create`, read one with `load`.

    All I/O is synchronous: an entry is on stable storage when the call returns, and nothing
    else of this process may run between the last entry and what it announces.

    :ivar record: what the change intends.
    :ivar paths: its files; that in the state directory comes first.
    :ivar entries: what was added since, oldest first.
    :ivar alone: whether it lies in the state directory alone although its change has a home.
    """

    def __init__(
        self,
        record: Record,
        paths: tuple[Path, ...],
        entries: list[dict[str, Any]],
        *,
        alone: bool = False,
    ):
        self.record = record
        self.alone = alone
        self.paths = paths
        self.entries = entries
        self.held: list[float] = []  # seconds that each pivot of this process held the guest

    @classmethod
    def create(cls, record: Record, beside: Path | None = None) -> Journal:
        """Write the record where it is to be found after a crash.

        Where one of the two places has no room, the other one suffices.

        :param beside: the image beside which it is also kept, and where `mark` writes.
        :raise NoRoomError: there is no room for it; nothing is left of it.
        :raise Error: it cannot be written; nothing is left of it.
        """
        journal = cls(record, (), [])
        said = record.as_json()
        inside = state_directory() / _file_name(record)
        try:
            lacking = _make_directory(inside.parent)
            if beside is not None:
                journal.alone = bool(journal._write_first(_beside(beside, record.run), said))
            if not lacking:
                said |= {"alone": True} if journal.alone else {}
                lacking = journal._write_first(inside, said)
        except OSError as error:
            journal.remove()
            raise _cannot_begin(error, beside) from None
        if not journal.paths:
            raise NoRoomError(
                f"there is no room for the journal of this change in {printable(inside.parent)}"
                + (f", nor beside {printable(beside)}" if beside is not None else ""),
                standing="nothing was changed",
                remedy="set QMPBLOCK_STATE to a directory on a file system with some kilobytes "
                "free, that outlives a crash of this host; recover looks there only if it is set "
                "then, too",
            )
        if journal.alone:
            journal._mark_elsewhere()
        elif lacking:
            _log.warning("no room in %s: the journal lies beside the image alone", inside.parent)
        return journal

    def _write_first(self, path: Path, said: dict[str, Any]) -> bool:
        """Write the first line of a new file; return whether there was no room for it."""
        text = json.dumps(stamped(said)) + "\n"
        try:
            # Exclusive: a path beside an image may be in a directory that others write to.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in _FULL:
                return True
            raise
        try:
            # What was there before is not ours to remove; this is.
            before, self.paths = self.paths, (path, *self.paths)
            _reserve(fd, len(text))
            _write(fd, text)
            _sync_directory(path.parent)
        except OSError as error:
            error.filename = path
            if error.errno not in _FULL:
                raise
            path.unlink()
            self.paths = before
            return True
        finally:
            os.close(fd)
        return False

    def _mark_elsewhere(self) -> None:
        home = self.record.home
        _log.warning(
            "no room beside %s: the journal lies in %s alone. If QEMU and qmpblock die, run on "
            "this host: qmpblock recover %s",
            printable(home),
            printable(self.paths[0].parent),
            printable(home),
        )
        path = _elsewhere(self.record)
        with contextlib.suppress(OSError):  # without it, only other hosts know less
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            _sync_directory(path.parent)

    def add(self, **entry: Any) -> None:
        """Write an entry everywhere.

        :raise Error: it cannot be written; the disk is full, say.
        """
        self._append(entry, self.paths)

    def mark(self, **entry: Any) -> None:
        """Write an entry nearest to the image, with one fsync: the guest waits for it."""
        self._append(entry, self.paths[-1:])

    def restart(self) -> None:
        """Forget the entries, where nothing that they tell of is there any more.

        So a change of many slices keeps a short journal.

        :raise Error: it cannot be written.
        """
        for path in self.paths:
            try:
                with path.open("r+b") as file:
                    size = file.truncate(len(file.readline()))
                    _reserve(file.fileno(), size)
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(path, error) from None
        self.entries.clear()

    def _append(self, entry: dict[str, Any], paths: tuple[Path, ...]) -> None:
        for path in paths:
            try:
                fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    _append_line(fd, json.dumps(entry) + "\n")
                finally:
                    os.close(fd)
            except OSError as error:
                raise _cannot_write(path, error) from None
        self.entries.append(entry)

    @property
    def complete(self) -> bool:
        """Whether every entry is here: that is so beside the image, where it is kept there."""
        home = self.record.home
        return (
            self.alone
            or not home
            or any(path.name == home_path(self.record).name for path in self.paths)
        )

    @property
    def pivoted(self) -> bool:
        """Whether the base, not the top, is the image to trust."""
        return pivoted(self.entries)

    def made(self) -> dict[str, tuple[int, int]]:
        """Return the image files that the change made, with device and inode."""
        found = {}
        for entry in self.entries:
            made = entry.get("made")
            if isinstance(made, str) and made in self.record.files:
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    found[made] = (int(entry["dev"]), int(entry["ino"]))
        return found

    def remove(self) -> None:
        """Remove it: the change has ended. Idempotent."""
        elsewhere = (_elsewhere(self.record),) if self.alone else ()
        for path in (*elsewhere, *self.paths):
            with contextlib.suppress(OSError):
                path.unlink()
                _sync_directory(path.parent)

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read a journal.

        :return: None if there is none, if it was torn before it began, and if it is not
            believed: others than this user and root could have written it.
        :raise RecordError: it is ours, and cannot be read.
        """
        try:
            data = content(path)
        except DistrustedError:
            return None
        return None if data is None else cls.parse(path, data)

    @classmethod
    def parse(cls, path: Path, data: bytes) -> Journal | None:
        """Read what a journal's file holds; see `load`."""
        if _is_torn(data):
            return None
        *lines, _torn = data.split(b"\n")
        first: Any = None
        record = None
        try:
            first = _parsed(lines, 0, len(data))
            said = unstamped(first)
            alone = said.pop("alone", False) is True
            record = Record.from_json(said)
            record.check_journaled()
            entries = [_parsed(lines, number) for number in range(1, len(lines))]
        except UnreadableError as error:
            raise RecordError(
                f"the journal {printable(path)} is ours by its name and cannot be read: {error}",
                standing="nothing was touched",
                remedy=_REMEDY,
                path=path,
                run=run_of(path),
                files=_files_of(record.as_json() if record else first),
            ) from None
        return cls(record, (path,), entries, alone=alone)


class DistrustedError(Exception):
    """Others could have written it, and files are removed by what it says. Says why."""


def content(path: Path) -> bytes | None:
    """Read a file that is ours by its name; None if it is not there.

    :raise RecordError: it cannot be read.
    :raise DistrustedError: it is not to be believed.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise DistrustedError("it is no plain file")
        if status.st_uid not in (0, os.geteuid()):
            raise DistrustedError(f"it belongs to the user {status.st_uid}")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            now = os.fstat(fd)
            if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino) or now.st_mode & 0o022:
                raise DistrustedError("others may write to it")
            return file.read(_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(
            f"the journal {printable(path)} cannot be read: {error.strerror}",
            standing="nothing was touched",
            remedy="run this as root, or as the user who ran that qmpblock",
            path=path,
            run=run_of(path),
        ) from None


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
    if size > _LIMIT:
        raise UnreadableError("it is longer than any of ours")
    try:
        found = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnreadableError(f"its line {number + 1} is damaged")
    return found


def is_elsewhere(path: Path) -> bool:
    """Whether a file that is ours by its name says that its journal is elsewhere."""
    return path.suffix == ELSEWHERE


def run_of(path: Path) -> str:
    """Return the run of a file that is ours by its name; empty if it is not."""
    match = _NAME.fullmatch(path.name)
    return match[1] if match else ""


def _files_of(data: Any) -> tuple[str, ...] | None:
    """Return the image files that a record of any version is about; None if it does not say."""
    if not isinstance(data, Mapping):
        return None
    found = [data.get("images"), data.get("files")]
    if not all(isinstance(one, list | tuple) for one in found) or not found[0]:
        return None
    return tuple(str(file) for one in found for file in one or ())


def discard_torn(record: Record) -> None:
    """Remove a journal of this change whose first line was never complete."""
    paths = [state_directory() / _file_name(record)]
    if record.home:
        paths.append(home_path(record))
    for path in paths:
        with contextlib.suppress(OSError, RecordError, DistrustedError):
            data = content(path)
            if data is not None and _is_torn(data) and path.stat().st_uid == os.geteuid():
                path.unlink()


def pivoted(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the last word of these entries is that the base is the image to trust."""
    words = [entry[PIVOTED] for entry in entries if PIVOTED in entry]
    return bool(words) and words[-1] is True


def _make_directory(path: Path) -> bool:
    """Make the state directory, if it is not there; return whether there was no room for it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return True
    return False


def _cannot_begin(error: OSError, beside: Path | None) -> Error:
    home = beside is not None and Path(str(error.filename)).parent == beside.parent
    return Error(
        f"cannot write the journal {printable(error.filename)}: {error.strerror}",
        standing="nothing was changed",
        remedy="the directory of the image must be writable: what tells which image to start from "
        "after a crash is kept there"
        if home
        else "set QMPBLOCK_STATE to a directory that this user may write to",
    )


def _cannot_write(path: Path, error: OSError) -> Error:
    return Error(
        f"cannot write to the journal {printable(path)}: {error.strerror}",
        remedy="make room there",
    )


def _elsewhere(record: Record) -> Path:
    return home_path(record).with_suffix(ELSEWHERE)


def home_path(record: Record) -> Path:
    """Return where the journal of a change that has a home lies beside its image."""
    return _beside(Path(record.home), record.run)


def _beside(image: Path, run: str) -> Path:
    return image.with_name(f"{image.name}.qmpblock-{run}.journal")


def _file_name(record: Record) -> str:
    which = hashlib.sha256(" ".join(record.devices).encode()).hexdigest()[:8]
    return f"{of_vm(record.vm)}{which}-{record.run}.journal"


def of_vm(vm: VMIdentity) -> str:
    """Return what the names of the journals of a VM begin with in the state directory."""
    return f"{vm.uuid}-{vm.pid}-{vm.start}-"


def _reserve(fd: int, size: int) -> None:
    """Give a journal of `size` bytes room for what it will need besides."""
    try:
        keep_size(fd, 0, size + _SPARE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _append_line(fd: int, text: str) -> None:
    """Write a line, or nothing of it: half a line, or one not acted upon, would be believed."""
    size = os.fstat(fd).st_size
    before = os.pread(fd, size, 0).rfind(b"\n") + 1
    if before < size:
        os.ftruncate(fd, before)  # a dead controller's last line, torn
        with contextlib.suppress(OSError):
            _reserve(fd, before)
    try:
        _write(fd, text)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, before)
            os.fsync(fd)
        raise


def _write(fd: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
