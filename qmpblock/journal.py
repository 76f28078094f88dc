"""Journal: what a change intends, and how far it is, on stable storage before it happens.

A change is described by one `Record`. It is kept in two places with different lives:

- in the data of the change's lock, an object inside QEMU (`qmpblock.lock`): it outlives the
  controller, and ends with QEMU;
- in a journal on the controller's host, which outlives both. A change after which the
  image to start from is another one (an active commit) also keeps its journal beside the
  active image, as `IMAGE.qmpblock-RUN.journal`, so that whoever finds the image finds it.

A journal is a text file: the record as JSON in the first line, then one line an entry, each
written and fsynced before what it announces. A last line that is torn was never acted upon.
What happened is otherwise read from QEMU itself, or from the images: the journal says only
what cannot be seen there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from qmpblock.errors import Error, printable

__all__ = [
    "PIVOTED",
    "Journal",
    "Record",
    "VMIdentity",
    "discard_torn",
    "journals",
    "pivoted",
    "state_directory",
]

#: The key of the entry that says whether the base is the image to trust now.
PIVOTED = "pivoted"

_RUN = re.compile(r"[0-9a-f]{8}")
_LIMIT = 16 << 20  # bytes of a journal that are read; one of ours has some kilobytes


@dataclass(frozen=True)
class VMIdentity:
    """Which QEMU process it was.

    :ivar uuid: of the VM; zeros where it has none.
    :ivar pid: 0 where it is unknown (a TCP monitor); with `start`, its start time in clock
        ticks since boot, and `boot`, the boot's id, it names one process for ever.
    :ivar monitor: the address that the controller came by.
    """

    name: str
    uuid: str
    pid: int
    start: int
    boot: str
    monitor: str


@dataclass(frozen=True)
class Record:
    """What one change intends: all that undoing it, or carrying it on, needs to know.

    :ivar run: in the names of all that it makes.
    :ivar operation: `snapshot`, `stream`, `commit` or `allocate`.
    :ivar devices: QOM paths of the disks; `names`: what people call them.
    :ivar locks: the ids of the locks that it holds.
    :ivar job: the id of its job, or empty; `helpers`: of those that only prepare.
    :ivar pivot: whether the job ends in a pivot: an active commit.
    :ivar flush: the node that must be flushed before the job is finalized, or empty.
    :ivar keeper: the node whose backing link will change; empty where the job pivots.
    :ivar top: the node that is streamed into, or the upper end of a commit; `base` the lower.
    :ivar top_file: its image file; also `base_file`, and `base_format` where that matters.
    :ivar leaving: the nodes that leave the chain, each with its file name.
    :ivar nodes: nodes that it adds, in the order in which they can be removed.
    :ivar files: image files that it makes.
    :ivar bitmaps: dirty bitmaps that it adds to nodes that were there: (node, name).
    :ivar promotions: those of them that are to become persistent once their node is writable:
        (node, name of the transient one, name, granularity).
    :ivar merges: dirty bitmaps to be taken over before the job is finalized:
        (target node, source node, name).
    :ivar throttle: the guest's I/O limits, as they were, where it lowers them; empty if not.
        Its `group` is in `throttle_group`.
    :ivar detect_zeroes: of the base, where it is another one for a while; empty if not.
    :ivar images: every image file of the disks, the active ones first.
    """

    run: str
    operation: str
    vm: VMIdentity
    devices: tuple[str, ...]
    names: tuple[str, ...]
    locks: tuple[str, ...]
    job: str = ""
    helpers: tuple[str, ...] = ()
    pivot: bool = False
    flush: str = ""
    keeper: str = ""
    top: str = ""
    base: str = ""
    top_file: str = ""
    base_file: str = ""
    base_format: str = ""
    leaving: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    bitmaps: tuple[tuple[str, str], ...] = ()
    promotions: tuple[tuple[str, str, str, int], ...] = ()
    merges: tuple[tuple[str, str, str], ...] = ()
    throttle: tuple[tuple[str, int], ...] = ()
    throttle_group: str = ""
    detect_zeroes: str = ""
    images: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """The image beside which its journal is kept too; empty where it pivots nothing."""
        if not self.pivot:
            return ""
        return self.base_file if self.operation == "allocate" else self.top_file

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Record | None:
        """Read a record that somebody may have forged; None if it is none of ours.

        Whatever it names that we would have made has our name in it.
        """
        record = _read(cls, data)
        if not isinstance(record, Record) or not _RUN.fullmatch(record.run):
            return None
        prefix = f"qmpblock-{record.run}-"
        ours = [*record.nodes, *record.helpers, *([record.job] if record.job else [])]
        if not all(name.startswith(prefix) for name in ours):
            return None
        if not all(name.startswith("qmpblock-disk-") for name in record.locks):
            return None
        if record.detect_zeroes not in ("", "on", "unmap"):  # it goes into a command line
            return None
        return record

    def describe(self) -> str:
        """Say what it is, for people."""
        return f"{self.operation} of {', '.join(map(printable, self.names))} (run {self.run})"


def _read(kind: Any, data: Any) -> Any:
    """Read a value of a dataclass's field type from JSON; None if it does not fit."""
    if kind in (str, int, bool):
        return data if type(data) is kind else None
    if get_origin(kind) is tuple:
        if not isinstance(data, list | tuple):
            return None
        kinds = get_args(kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(data)
        if len(kinds) != len(data):
            return None
        found = tuple(_read(k, item) for k, item in zip(kinds, data, strict=True))
        return None if any(item is None for item in found) else found
    if not isinstance(data, Mapping):
        return None
    hints = get_type_hints(kind)
    if set(data) != {field.name for field in fields(kind)}:
        return None
    values = {name: _read(hints[name], value) for name, value in data.items()}
    return None if any(value is None for value in values.values()) else kind(**values)


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
    :ivar entries: what was added since, oldest first.
    """

    def __init__(self, record: Record, paths: tuple[Path, ...], entries: list[dict[str, Any]]):
        self.record = record
        self.paths = paths
        self.entries = entries
        self.held: list[float] = []  # seconds that each pivot of this process held the guest

    @classmethod
    def create(cls, record: Record, beside: Path | None = None) -> Journal:
        """Write the record where it is to be found after a crash.

        :param beside: the image beside which it is also kept, and where `mark` writes.
        :raise Error: it cannot be written; nothing is left of it.
        """
        directory = state_directory()
        paths = [directory / _file_name(record)]
        if beside is not None:
            paths.append(_beside(beside, record.run))
        journal = cls(record, (), [])
        text = json.dumps(record.as_json()) + "\n"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in paths:
                # Exclusive: a path beside an image may be in a directory that others write to.
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                journal.paths += (path,)  # what was there before is not ours to remove
                try:
                    _write(fd, text)
                finally:
                    os.close(fd)
                _sync_directory(path.parent)
        except OSError as error:
            journal.remove()
            raise Error(
                f"cannot write the journal {printable(error.filename)}: {error.strerror}",
                standing="nothing was changed",
                remedy="set QMPBLOCK_STATE to a directory that this user may write to"
                if error.filename and str(error.filename).startswith(str(directory))
                else "the directory of the image must be writable: what tells which image to "
                "start from after a crash is kept there",
            ) from None
        return journal

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
                    file.truncate(len(file.readline()))
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
        return not home or any(path.name == _home_path(self.record).name for path in self.paths)

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
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.unlink()
                _sync_directory(path.parent)

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read a journal; None if it is none of ours, or was torn before it began."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                status = os.fstat(file.fileno())
                # Beside an image others may put files, and files are removed by what it says.
                if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                    return None
                data = file.read(_LIMIT)
        except OSError:
            return None
        *lines, _torn = data.split(b"\n")
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                return None
        record = Record.from_json(entries[0]) if entries else None
        if record is None or not all(isinstance(entry, dict) for entry in entries):
            return None
        return cls(record, (path,), entries[1:])


def discard_torn(record: Record) -> None:
    """Remove a journal of this change whose first line was never complete.

    Its controller was killed while it wrote it, and had done nothing yet.
    """
    paths = [state_directory() / _file_name(record)]
    if record.home:
        paths.append(_home_path(record))
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                torn = os.fstat(fd).st_uid == os.geteuid() and b"\n" not in file.read(_LIMIT)
            if torn:
                path.unlink()


def pivoted(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the last word of these entries is that the base is the image to trust."""
    words = [entry[PIVOTED] for entry in entries if PIVOTED in entry]
    return bool(words) and words[-1] is True


def journals(images: tuple[str, ...] = ()) -> Iterator[Journal]:
    """Yield every journal on this host: of the state directory, and beside `images`.

    The two files of one change come as one journal. The one beside the image has every entry,
    in their order; which of two entries was the last only it can tell.
    """
    found: dict[str, Journal] = {}
    places = sorted(state_directory().glob("*.journal"))
    for image in images:
        path = Path(image)
        with contextlib.suppress(OSError):
            places += sorted(
                other
                for other in path.parent.iterdir()
                if other.name.startswith(f"{path.name}.qmpblock-")
            )
    seen: set[Path] = set()
    while places:
        path = places.pop(0)
        if path in seen:
            continue
        seen.add(path)
        journal = Journal.load(path)
        if journal is None:
            continue
        record = journal.record
        if record.home:
            places.append(_home_path(record))
        known = found.get(record.run)
        if known is None:
            found[record.run] = journal
        elif known.record == record:
            known.paths += journal.paths
            if path.name == _home_path(record).name:
                known.entries = journal.entries
    yield from found.values()


def _cannot_write(path: Path, error: OSError) -> Error:
    return Error(
        f"cannot write to the journal {printable(path)}: {error.strerror}",
        remedy="make room there",
    )


def _home_path(record: Record) -> Path:
    return _beside(Path(record.home), record.run)


def _beside(image: Path, run: str) -> Path:
    return image.with_name(f"{image.name}.qmpblock-{run}.journal")


def _file_name(record: Record) -> str:
    vm = record.vm
    which = hashlib.sha256(" ".join(record.devices).encode()).hexdigest()[:8]
    return f"{vm.uuid}-{vm.pid}-{vm.start}-{which}-{record.run}.journal"


def _append_line(fd: int, text: str) -> None:
    """Write a line, or nothing of it: half a line, or one not acted upon, would be believed."""
    size = os.fstat(fd).st_size
    before = os.pread(fd, size, 0).rfind(b"\n") + 1
    if before < size:
        os.ftruncate(fd, before)  # a dead controller's last line, torn
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
