"""What others rely on in a file, and which files are images, by the locks that QEMU puts on them.

Each QEMU holds byte-range locks on its images, which say what it does with them and what it cannot
bear others to do (block/file-posix.c, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE)::

    byte 100 + p   does p      byte 200 + p   nobody else may do p       p = 1: write

A VM with file.locking=off neither takes nor sees them. They are in /proc/locks, without their
owner; what the VM itself holds is in its /proc/PID/fdinfo, so the rest is somebody else's.

The kernel gives /proc/locks out by the page and counts anew at each: where anybody locks or unlocks
meanwhile, a line comes twice or not at all (measured: 3 lines in 100 beside a process that does so
all the time). So what is read once proves nothing, unless it is one page; many readings do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from qmpblock.graph.places import FileId
from qmpblock.host.openfiles import OpenFiles

__all__ = ["foreign_users", "images_of", "is_used", "written"]

_WRITES, _NO_WRITES = 101, 201
_ALL = range(100, 300)
_LEAD = 6  # readings of /proc/locks that say so, more than say the other
_MOST_READINGS = 200
_LOCK = re.compile(
    r"OFDLCK\s+ADVISORY\s+\w+\s+-?\d+\s+([0-9a-f]+):([0-9a-f]+):(\d+)\s+(\d+)\s+(\d+|EOF)"
)


def foreign_users(files: OpenFiles, file: FileId) -> str | None:
    """Say which processes have a file open that write to it or cannot bear that; None for none.

    :param files: of the VM that is about to write to it.
    """
    if files.pid is None or files.blind is not None or file.is_device:
        return None
    pid = files.pid
    if not _agreed(lambda lines: _held(lines, file) > _held(_own(pid), file)):
        return None
    pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and int(entry.name) not in (pid, os.getpid())
    ]
    users = [str(pid) for pid in pids if file in OpenFiles(pid).ids()]
    return f"process {', '.join(users)}" if users else "another process"


def images_of(files: OpenFiles) -> set[FileId]:
    """Return the files that a VM has open and holds an image's locks on."""
    if files.pid is None or files.blind is not None:
        return set()
    lines = _own(files.pid)
    return {file for file in files.ids() if not file.is_device and _held(lines, file, _ALL)}


def is_used(file: FileId) -> bool:
    """Whether the locks on a file say that a QEMU, or a tool of it, has it open as an image."""
    if file.is_device:
        return False
    return _agreed(lambda lines: _held(lines, file, _ALL) > 0)


def written(files: Iterable[FileId]) -> list[FileId]:
    """Return those of some files of which a QEMU's locks say that it writes to them."""
    readings = _Readings()
    return [
        file
        for file in files
        if not file.is_device and _agreed(partial(_is_written, file), readings)
    ]


def _is_written(file: FileId, lines: Iterable[str]) -> bool:
    return _held(lines, file, (_WRITES,)) > 0


class _Readings:
    """Readings of everybody's locks, each taken when it is first needed, then for all files."""

    def __init__(self) -> None:
        self._taken: list[tuple[list[str], bool]] = []

    def __iter__(self) -> Iterator[tuple[list[str], bool]]:
        for number in range(_MOST_READINGS):
            if number == len(self._taken):
                self._taken.append(_everybodys())
            yield self._taken[number]


def _agreed(look: Callable[[list[str]], bool], readings: _Readings | None = None) -> bool:
    """Return what most readings of everybody's locks say."""
    balance = 0
    for lines, exact in readings or _Readings():
        answer = look(lines)
        balance += 1 if answer else -1
        if exact or abs(balance) == _LEAD:
            return answer
    return balance > 0


def _everybodys() -> tuple[list[str], bool]:
    """Return the lines of /proc/locks, and whether they are of one instant."""
    try:
        with Path("/proc/locks").open("rb", buffering=0) as file:
            pages = list(iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return [], True
    return b"".join(pages).decode().splitlines(), len(pages) < 2


def _own(pid: int) -> list[str]:
    lines = []
    try:
        entries = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    except OSError:
        return []
    for entry in entries:
        lines += [line for line in _read(entry) if line.startswith("lock:")]
    return lines


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # closed since it was listed


def _held(lines: Iterable[str], file: FileId, wanted: Iterable[int] = (_WRITES, _NO_WRITES)) -> int:
    """Count the locks on a file that are on some bytes: those that are about writing."""
    count, its = 0, f":{file.inode} "
    for line in lines:
        if its not in line or "->" in line:
            continue  # of a host with many VMs, nearly every line
        match = _LOCK.search(line)
        if match is None:
            continue
        major, minor, inode, first, last = match.groups()
        if (os.makedev(int(major, 16), int(minor, 16)), int(inode)) != (file.device, file.inode):
            continue
        stop = 1 << 63 if last == "EOF" else int(last)
        count += sum(int(first) <= byte <= stop for byte in wanted)
    return count
