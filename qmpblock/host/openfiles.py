"""Which file a VM has open, told by its own descriptors, and what names lead to it.

A file name that QEMU reports is what it was once given: since then the file may have been
renamed or replaced, the name may count from a directory that QEMU has left (-daemonize), and
to QEMU it may lead elsewhere than to us (a mount namespace of its own, -chroot). What QEMU
has open it cannot mistake, and /proc/PID/fd shows it (proc_pid_fd(5)). So a file is told by
device and inode (a block device by its number), and a name counts only while it leads to one
that is open::

    QEMU's name --(looked up as QEMU would)--> file  ==  one of /proc/PID/fd

Looked up are, of an absolute name, what it leads to in QEMU's view and in ours; of a relative
one, all that it may be, and it must be one file. /dev/fdset/N and /dev/fd/N say themselves
which descriptors they mean.
"""

from __future__ import annotations

import ctypes
import errno
import os
import posixpath
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.graph.places import FileId, Missing, Place

if TYPE_CHECKING:
    from qmpblock.graph.model import Node

__all__ = ["NOWHERE", "OpenFiles", "names_here", "openers", "sees_directory"]

_DRIVERS = ("file", "host_device")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(self|\d+))/fd/(\d+)")
_FDSET = re.compile(r"/dev/fdset/\d+")
_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_IN_ROOT = 0x10  # linux/openat2.h
_OPEN_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_DELETED = " (deleted)"
_APART = "which has mounts or a root directory of its own (a container, -chroot, ...)"
#: What `sees_directory` says of a directory that is neither here nor there for the VM.
NOWHERE = "is not there"
# QEMU's command line has one of these, also where -name process= hides what it is.
_OPTIONS = {b"-blockdev", b"-chardev", b"-drive", b"-mon", b"-qmp", b"-qmp-pretty"}


@dataclass(frozen=True)
class _Open:
    fd: int
    name: str
    file: FileId
    deleted: bool
    status: os.stat_result


class OpenFiles:
    """The files that the process of a VM has open, at one moment.

    :param pid: of the process at the other end of the monitor; None where that is not known.
    :ivar blind: why nothing can be seen of it; None where it can.
    """

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.blind: str | None = None
        self._open: tuple[_Open, ...] = ()
        if pid is None:
            self.blind = (
                "cannot be found from here: the monitor does not tell the VM's process (it is "
                "reached over TCP, or QEMU runs in another container)"
            )
            return
        try:
            self._open = tuple(_descriptors(pid))
        except PermissionError:
            self.blind = (
                f"cannot be found from here: what the VM's process {pid} has open only its user "
                "and root may see (in a container, with SYS_PTRACE and DAC_READ_SEARCH)"
            )
        except OSError:
            self.blind = f"cannot be found from here: the VM's process {pid} cannot be seen"

    def ids(self) -> set[FileId]:
        """Return every file that is open."""
        return {one.file for one in self._open}

    def descriptors(self, file: FileId) -> list[int]:
        """Return the process's descriptors of a file."""
        return [one.fd for one in self._open if one.file == file]

    def status(self, file: FileId) -> os.stat_result | None:
        """Return stat(2) of an open file, as it was when these were looked at; None: it is not."""
        return next((one.status for one in self._open if one.file == file), None)

    def places(self, nodes: Iterable[Node]) -> dict[str, Place | Missing]:
        """Say of protocol nodes where their files are, by the nodes' names."""
        return {node.name: self.place(node) for node in nodes if node.driver in _DRIVERS}

    def place(self, node: Node) -> Place | Missing:
        """Say where the file of a protocol node is."""
        if node.driver not in _DRIVERS:
            return Missing(f"is no file of this host (its driver is {node.driver})")
        if self.pid is None or self.blind is not None:
            return Missing(str(self.blind))
        named = list(self._named(node))
        files = {file for file, _ in named}
        if not files:
            return self._missing(node.filename)
        if len(files) > 1:
            return Missing(
                "may be one of several files that the VM has open: the name is relative, and the "
                "VM has left the directory that it counts from"
            )
        [file] = files
        names = [name for _, name in named]
        names += [one.name for one in self._open if one.file == file and not one.deleted]
        return self._placed(file, names)

    def name_of(self, file: FileId) -> str | None:
        """Return a name on this host that leads to an open file now, by its descriptors."""
        names = [one.name for one in self._open if one.file == file and not one.deleted]
        place = self._placed(file, names)
        return place.here if isinstance(place, Place) else None

    def leads(self, path: str, file: FileId) -> bool:
        """Whether an absolute path leads to a file, as QEMU sees files (before -chroot: as we)."""
        return self.pid is not None and any(view.file(path) == file for view in _views(self.pid))

    def _named(self, node: Node) -> Iterator[tuple[FileId, str]]:
        """Yield the open files that a node's name may mean, with an absolute name of each."""
        name = node.filename
        if match := _DESCRIPTOR.fullmatch(name):
            given = {int(match[2])} if match[1] in (None, "self", str(self.pid)) else set()
            yield from self._given(given)
        elif _FDSET.fullmatch(name):
            yield from self._given(set(node.descriptors))
        elif name.startswith("/"):
            yield from self._absolute(name)
        elif name and "\0" not in name:
            yield from self._relative(name)

    def _absolute(self, name: str) -> Iterator[tuple[FileId, str]]:
        """Yield the open file to which an absolute name leads, where it does first."""
        assert self.pid is not None  # place() has seen to it
        is_open = self.ids()
        for view in _views(self.pid):
            file = view.file(name)
            if file is not None and file in is_open:
                yield file, name
                return

    def _relative(self, name: str) -> Iterator[tuple[FileId, str]]:
        """Yield the open files that a relative name may mean, from wherever it counts."""
        is_open, view = self.ids(), _View(self.pid)
        for full in (posixpath.join(start, name) for start in _starts(self.pid)):
            file = view.file(full)
            if file is not None and file in is_open:
                yield file, view.real(full) or full
        tail = "/" + posixpath.normpath(name)
        for one in self._open:
            if one.name.endswith(tail) and not one.deleted:
                yield one.file, one.name

    def _given(self, descriptors: set[int]) -> Iterator[tuple[FileId, str]]:
        """Yield the files of descriptors that QEMU was given, where it opened them as well."""
        for one in self._open:
            others = {other.fd for other in self._open if other.file == one.file}
            if one.fd in descriptors and others - descriptors:
                yield one.file, one.name

    def _placed(self, file: FileId, names: Iterable[str]) -> Place | Missing:
        """Choose the first name that leads to a file."""
        assert self.pid is not None  # place() has seen to it
        ours = _View(None)
        for name in names:
            for view in _views(self.pid):
                if _DESCRIPTOR.fullmatch(name) or view.file(name) != file:
                    continue
                real = view.real(name)
                if real is None:
                    continue
                here = next((one for one in (name, real) if ours.file(one) == file), None)
                if here is None:
                    here = f"/proc/{self.pid}/root{view.canonical(name)}"
                    if ours.file(here) != file:
                        continue
                canonical = view.canonical(name) or real
                linked = posixpath.dirname(canonical) != posixpath.dirname(real)
                return Place(file, name, real, here, linked)
        return Missing("has no name any more that leads to it: it has been removed", certain=True)

    def _missing(self, name: str) -> Missing:
        assert self.pid is not None  # place() has seen to it
        if not self.is_qemu:
            return Missing(
                f"cannot be found from here: the process {self.pid}, which made the monitor's "
                "socket, is not QEMU"
            )
        gone = any(
            one.deleted and one.name.endswith(posixpath.normpath(name)) for one in self._open
        )
        if gone and not (name.startswith("/") and _View(self.pid).file(name)):
            return Missing("has been removed since the VM opened it", certain=True)
        if name.startswith("/") and any(view.file(name) for view in _views(self.pid)):
            return Missing("is another file now than the one that the VM has open", certain=True)
        return Missing(
            "is not the name of any file that the VM has open: it has been renamed, removed or "
            "replaced since",
            certain=True,
        )

    @property
    def is_qemu(self) -> bool:
        """Whether the process is the VM: a manager may have made the socket and passed it on."""
        words: set[bytes] = set()
        with suppress(OSError):
            words = set(Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0"))
            return bool(words & _OPTIONS) or Path(
                f"/proc/{self.pid}/exe"
            ).readlink().name.startswith("qemu-")
        return False


def names_here(pid: int, name: str) -> list[str]:
    """Return names that lead here to what a name may lead to for another process.

    Told are those of what is there now, however it came there; of a relative name all that it may
    mean. None where that process's files cannot be seen, and its name leads nowhere here.
    """
    starts = [posixpath.sep] if name.startswith("/") else _starts(pid)
    found = []
    for full in (posixpath.join(start, name) for start in starts):
        for view in _views(pid):
            there = view.canonical(full)
            if there is None:
                continue
            here = full if view.pid is None or _sees_as_we_do(pid) else f"/proc/{pid}/root{there}"
            if Path(here).exists() and here not in found:
                found.append(here)
    return found


def openers(file: FileId) -> list[int]:
    """Return the processes that have a file open, of those that can be seen from here."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if file in OpenFiles(pid).ids()]


def sees_directory(pid: int | None, directory: str) -> str | None:
    """Say why a file made in a directory here is not there for the VM; None where it is.

    :param directory: absolute, or counting from this process's own.
    :return: in words that follow the directory's name.
    """
    files = OpenFiles(pid)
    if pid is None or files.blind is not None:
        return files.blind
    if not files.is_qemu:
        return (
            f"cannot be compared: the process {pid}, which made the monitor's socket, is not QEMU"
        )
    ours = _View(None).directory(directory)
    theirs = _View(pid).directory(directory)
    if ours is None and theirs is None:
        return NOWHERE
    if ours is None:
        return f"is there only for the VM, {_APART}"
    if theirs is None:
        return f"is not there for the VM, {_APART}"
    if ours != theirs:
        return f"is another one for the VM, {_APART}"
    return None


def _descriptors(pid: int) -> Iterator[_Open]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(entry.readlink())
            status = entry.stat()
        except PermissionError:
            raise  # they may be listed, but not looked into: by root without CAP_SYS_PTRACE
        except OSError:
            continue  # closed since it was listed
        file = FileId.of(status)
        if file is not None:
            deleted = status.st_nlink == 0
            name = name.removesuffix(_DELETED) if deleted else name
            yield _Open(int(entry.name), name, file, deleted, status)


def _starts(pid: int | None) -> list[str]:
    """Return the directories from which a process's relative names may count."""
    starts = []
    with suppress(OSError):
        starts.append(str(Path(f"/proc/{pid}/cwd").readlink()))
    with suppress(OSError):
        # Where a shell started it: -daemonize leaves for the root directory.
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"PWD="):
                starts.append(os.fsdecode(word[4:]))
    return [one for one in starts if one.startswith("/")]


def _views(pid: int) -> tuple[_View, ...]:
    """Return the views in which QEMU's names may count: its own, and ours (before -chroot)."""
    return _View(pid), _View(None)


@dataclass(frozen=True)
class _View:
    """How a process sees files; None: as this one does."""

    pid: int | None

    def file(self, path: str) -> FileId | None:
        """Return what a path leads to."""
        status = self._stat(path)
        return None if status is None else FileId.of(status)

    def directory(self, path: str) -> tuple[int, int] | None:
        """Return device and inode of a directory."""
        status = self._stat(path)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return None
        return status.st_dev, status.st_ino

    def real(self, path: str) -> str | None:
        """Return a path through no directory that is a link; its last part stays."""
        directory = self.canonical(posixpath.dirname(path))
        return None if directory is None else posixpath.join(directory, posixpath.basename(path))

    def canonical(self, path: str) -> str | None:
        """Return a path without links."""
        fd = self._open(path)
        if fd is None:
            return None
        try:
            return str(Path(f"/proc/self/fd/{fd}").readlink())
        finally:
            os.close(fd)

    def _stat(self, path: str) -> os.stat_result | None:
        fd = self._open(path)
        if fd is None:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _open(self, path: str) -> int | None:
        """Open a path, to say what it leads to only (O_PATH)."""
        flags = os.O_PATH | os.O_CLOEXEC
        try:
            if self.pid is None or _sees_as_we_do(self.pid):
                return os.open(path, flags)
            root = os.open(f"/proc/{self.pid}/root", flags | os.O_DIRECTORY)
        except (OSError, ValueError):
            return None
        try:
            return _open_in_root(root, path, flags)
        finally:
            os.close(root)


def _sees_as_we_do(pid: int) -> bool:
    """Whether a process has our mounts and root directory: every path is the same to both."""
    try:
        mounts = [Path(f"/proc/{one}/ns/mnt").readlink() for one in (pid, "self")]
        roots = [Path(f"/proc/{one}/root").stat() for one in (pid, "self")]
    except OSError:
        return False
    return mounts[0] == mounts[1] and os.path.samestat(*roots)


def _open_in_root(root: int, path: str, flags: int) -> int | None:
    """Open a path as a process with that root directory would: links stay inside it."""
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_IN_ROOT)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return None
    while True:
        fd = libc.syscall(_OPENAT2, root, ctypes.c_char_p(name), ctypes.c_char_p(how), len(how))
        # EAGAIN: something was renamed meanwhile (openat2(2)).
        if fd >= 0 or ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            return fd if fd >= 0 else None
