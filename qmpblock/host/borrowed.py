"""A file that another process has open for writing, borrowed: with no more right to it than it has.

Root could write to any file, and use space that is kept for root. What a VM's process says it
needs must not become that: its monitor may be answered by whoever runs it. So space is reserved
only in a file that the very process has open for writing, which the kernel tells (its own
descriptor is taken by pidfd_getfd(2)), and in its user's name: neither blocks that are kept for
root nor an exemption from quotas are used.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmpblock.errors import UNTOUCHED, DisconnectedError, UnsupportedError, printable
from qmpblock.graph.places import FileId

__all__ = ["in_the_name_of", "open_as_it_has"]

_PIDFD_OPEN, _PIDFD_GETFD = 434, 438  # the same numbers on every architecture
_WRITING = (os.O_WRONLY, os.O_RDWR)
# capabilities(7), linux/capability.h
_VERSION_3 = 0x20080522
_SYS_RESOURCE = 1 << 24
_SETS = struct.Struct("=6I")  # effective, permitted, inheritable; of 32 capabilities each


def open_as_it_has(pid: int, path: str) -> int:
    """Open a file for writing that a process has open for writing; return the descriptor.

    What is opened is that file, whatever `path` leads to a moment later.

    :raise UnsupportedError: the process does not have it open so, or that cannot be told.
    :raise DisconnectedError: the process has ended.
    :raise OSError: the file cannot be opened.
    """
    named = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        wanted = FileId.of(os.fstat(named))
    finally:
        os.close(named)
    try:
        with _handle(pid) as handle:
            for number in _numbers(pid):
                with suppress(FileNotFoundError), _taken(pid, handle, number) as fd:
                    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
                    if (
                        wanted is not None
                        and FileId.of(os.fstat(fd)) == wanted
                        and mode in _WRITING
                    ):
                        # Anew: what QEMU holds on its own is its alone, its locks for example.
                        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
            _check_lives(handle)
    except ProcessLookupError:
        raise DisconnectedError(
            f"the VM's process {pid} has ended", standing="contents are as they were"
        ) from None
    raise UnsupportedError(
        f"{printable(path)} is not open for writing in the VM's process {pid}: nothing is "
        "reserved in a file that it may only read",
        standing=UNTOUCHED,
    )


@contextmanager
def _handle(pid: int) -> Iterator[int]:
    fd = _syscall(_PIDFD_OPEN, pid, 0)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_lives(handle: int) -> None:
    """See that a process is not one that has ended, and was not waited for (pidfd_open(2))."""
    if select.select([handle], [], [], 0)[0]:
        raise ProcessLookupError


def _numbers(pid: int) -> list[int]:
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:
        raise ProcessLookupError from None
    except PermissionError:
        raise UnsupportedError(
            f"what the VM's process {pid} has open only its user and root may see",
            standing=UNTOUCHED,
        ) from None


@contextmanager
def _taken(pid: int, handle: int, number: int) -> Iterator[int]:
    """Have a process's own descriptor here, for a moment.

    :raise FileNotFoundError: it is not there any more.
    """
    try:
        fd = _syscall(_PIDFD_GETFD, handle, number, 0)
    except PermissionError:
        if os.geteuid() == 0:
            raise UnsupportedError(
                f"the kernel does not let root take a descriptor of the VM's process {pid} "
                "(ptrace_scope 3, a container without SYS_PTRACE), so that the file which it "
                "writes to cannot be proven",
                standing=UNTOUCHED,
                remedy="run qmpblock as the user that the VM runs as",
            ) from None
        # Its own user may not take it, but opens it with rights that it has itself.
        fd = _opened_by_its_link(pid, number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise FileNotFoundError(number) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _opened_by_its_link(pid: int, number: int) -> int:
    said = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
    match = re.search(r"^flags:\s*([0-7]+)$", said, re.MULTILINE)
    writing = match is not None and int(match[1], 8) & os.O_ACCMODE in _WRITING
    link = f"/proc/{pid}/fd/{number}"
    if not writing or FileId.of(Path(link).stat()) is None:
        raise FileNotFoundError(number)
    return os.open(link, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _syscall(number: int, *words: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, words))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


@contextmanager
def in_the_name_of(user: int) -> Iterator[None]:
    """Have this thread, and no other, use the file system as a user does who is not root.

    Where this process is not root it has no other name than its own already. By setfsuid(2), and
    without CAP_SYS_RESOURCE, which exempts from quotas and gives the blocks kept for root.

    :raise RuntimeError: it is the main thread, on which others' work is done.
    """
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("it would change what the event loop does meanwhile")
    if os.geteuid() != 0 or user == 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = _capabilities()
    libc.setfsuid(user)  # which takes away what overrides a file's permissions
    now = _capabilities()
    _set_capabilities((now[0] & ~_SYS_RESOURCE, *now[1:]))
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())
        _set_capabilities(before)


def _capabilities() -> tuple[int, ...]:
    """Return this thread's capabilities: effective, permitted, inheritable, low words first."""
    data = ctypes.create_string_buffer(_SETS.size)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    if ctypes.CDLL(None, use_errno=True).capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return _SETS.unpack(data.raw)


def _set_capabilities(words: tuple[int, ...]) -> None:
    data = ctypes.create_string_buffer(_SETS.pack(*words))
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    if ctypes.CDLL(None, use_errno=True).capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
