"""Who has an image file open for writing: then what is read of it from outside is of no moment.

A QEMU says it by the locks that it puts on its images (`qmpblock.host.filelocks`), which its tools
heed for most formats, but not for raw. One with file.locking=off does not, nor does any other
program: what they have open /proc shows, as far as whoever asks may look there. And what was
written to meanwhile, its file's times show.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qmpblock.errors import UNTOUCHED, Error, InUseError, printable
from qmpblock.graph.jsonname import innermost, said_by
from qmpblock.graph.places import FileId
from qmpblock.host.filelocks import written
from qmpblock.host.processes import describe_process

__all__ = ["check_unchanged", "check_unwritten", "in_use"]

_FLAGS = re.compile(rb"^flags:\s*([0-7]+)", re.MULTILINE)


def check_unwritten(files: Sequence[str]) -> dict[str, os.stat_result]:
    """Refuse files that a process has open for writing, as far as can be seen.

    :param files: as images are named; what is not there is passed over.
    :return: for `check_unchanged`.
    :raise InUseError: one has, and which.
    """
    seen = {name: status for name in files if (status := _status(name)) is not None}
    wanted: dict[FileId, str] = {}
    for name, status in seen.items():
        found = FileId.of(status)
        if found is not None:
            wanted.setdefault(found, name)
    for pid, file in _written(wanted):
        raise in_use(wanted[file], f"{describe_process(pid)} has it open for writing")
    for file in written(wanted):
        raise in_use(wanted[file], "by its locks, a QEMU has it open for writing")
    return seen


def check_unchanged(before: Mapping[str, os.stat_result]) -> None:
    """Refuse what was read of files that were written to meanwhile.

    Of a block device this cannot be told.

    :param before: what `check_unwritten` returned.
    :raise Error: one was.
    """
    for name, then in before.items():
        now = _status(name)
        if now is None or _mark(now) != _mark(then):
            raise Error(
                f"{printable(name, 1000)} was written to, or replaced, while it was read",
                standing="what was read of it is of no moment that there ever was",
                remedy="find out who did it, and do it again when nobody writes to it",
            )


def in_use(name: str, said: str) -> InUseError:
    """Return the refusal to read what somebody writes to.

    :param said: by whom, or by what that is known.
    """
    return InUseError(
        f"{printable(name, 1000)} is in use: {printable(said.strip(), 1000)}; what is read of it "
        "from outside is of no moment that there ever was",
        standing=UNTOUCHED,
        remedy="shut that VM down first; or compare an image that it has frozen (qmpblock "
        "snapshot ADDRESS DISK=OVERLAY)",
    )


def _status(name: str) -> os.stat_result | None:
    described = said_by(name)
    path = str(innermost(described).get("filename")) if described else name
    try:
        return Path(path).stat()
    except (OSError, ValueError):
        return None  # whoever opens it says why


def _mark(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _written(wanted: Mapping[FileId, str]) -> Iterator[tuple[int, FileId]]:
    """Yield the processes that have one of the files open for writing, and which."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            descriptors = [one.name for one in (entry / "fd").iterdir()]
        except OSError:
            continue  # it is not ours to look at, or has ended
        for one in descriptors:
            try:
                file = FileId.of((entry / "fd" / one).stat())
                if (
                    file is not None
                    and file in wanted
                    and _writes((entry / "fdinfo" / one).read_bytes())
                ):
                    yield int(entry.name), file
            except OSError:
                continue  # closed since it was listed


def _writes(info: bytes) -> bool:
    match = _FLAGS.search(info)
    return match is not None and int(match[1], 8) & os.O_ACCMODE != os.O_RDONLY
