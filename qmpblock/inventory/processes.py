"""Which processes of this host are QEMUs that run VMs, and where their monitors are from here.

All that is told is theirs to say, and anybody may start a process of any name: an address is one
only where the socket was made by that very process (SO_PEERCRED), which is asked before a word is
sent. A socket that it was given by whoever started it is told by its descriptor.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmpblock.address import LONGEST_PATH, MonitorAddress, TCPAddress, UnixAddress
from qmpblock.host.openfiles import names_here
from qmpblock.host.processes import Peer, command_line, users_of
from qmpblock.host.socketholders import is_held
from qmpblock.inventory.commandline import Listening, Started, is_vm, read_command_line
from qmpblock.sockets import open_socket

__all__ = ["QEMU", "Found", "find", "qemus"]

_LONGEST_FILE = 1 << 20  # bytes of a file of options
_QUEUE = 1.0  # seconds for a place in it
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - listened at by others, not by us
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True)
class QEMU:
    """A process that runs a VM.

    :ivar uid: as whom; `user`: by name where there is one.
    :ivar words: that it was started with.
    """

    pid: int
    uid: int
    user: str
    words: tuple[str, ...]
    started: Started


def qemus() -> list[QEMU]:
    """Return those that can be seen from here, by pid."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        words = command_line(pid)
        if not words:
            continue  # of the kernel, or it has ended
        try:
            file = str((entry / "exe").readlink()).removesuffix(" (deleted)")
        except OSError:
            file = words[0]
        if not is_vm(file, words):
            continue
        with suppress(OSError):  # it has ended
            started = read_command_line(words, partial(_text, pid))
            uid = users_of(pid)[0]
            found.append(QEMU(pid, uid, _user(uid), words, started))
    return sorted(found, key=lambda one: one.pid)


def _text(pid: int, name: str) -> str:
    """Return the text of a file that a process was given; empty where that cannot be read."""
    for here in names_here(pid, name):
        with suppress(OSError), Path(here).open("rb") as file:
            return file.read(_LONGEST_FILE).decode(errors="replace")
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@dataclass(frozen=True)
class Found:
    """Where a monitor is from here.

    :ivar why: why it has no address, or is of no use by that now; in words, after "its monitor".
    :ivar held: whether somebody is connected to it.
    """

    address: MonitorAddress | None
    why: str = ""
    held: bool = False


async def find(qemu: QEMU, monitor: Listening) -> Found:
    """Find a monitor of a QEMU.

    Connects, where that tells whose it is, and leaves without a word.
    """
    if monitor.fd is not None:
        return _given(qemu.pid, monitor.fd)
    if monitor.abstract:
        return Found(None, f"has an abstract name ({monitor.path}), which is no path")
    if monitor.tcp is not None:
        if _net(qemu.pid) not in (None, _net(os.getpid())):
            return Found(None, "listens in a network namespace of its own")
        host, port = monitor.tcp
        return Found(TCPAddress("127.0.0.1" if host in _EVERYWHERE else host, port))
    found = Found(None, f"{monitor.path} leads nowhere from here, as far as this user may look")
    for name in names_here(qemu.pid, monitor.path):
        found = await _made_by(qemu.pid, name)
        if found.address is not None:
            break
    return found


async def _made_by(pid: int, name: str) -> Found:
    """Return a UNIX socket, if a process made it."""
    if len(os.fsencode(name)) > LONGEST_PATH:
        return Found(None, f"has a name of more than {LONGEST_PATH} bytes from here ({name})")
    address = UnixAddress(name)
    held = is_held(address)  # afterwards that could be ourselves
    try:
        async with asyncio.timeout(_QUEUE):
            sock = await open_socket(address)
    except TimeoutError:
        return Found(address, f"{name} has a full queue, so many wait for it already", held)
    except OSError as error:
        return Found(None, f"{name} cannot be connected to: {error.strerror}")
    with sock:
        peer = Peer.of(sock)
    if peer is None or peer.pid == pid:
        return Found(address, held=held)
    return Found(None, f"{name} is another process's ({peer.pid})")


def _given(pid: int, fd: int) -> Found:
    """Find the path of a listening socket by a process's descriptor of it."""
    try:
        match = _SOCKET.fullmatch(str(Path(f"/proc/{pid}/fd/{fd}").readlink()))
        paths = dict(_unix_paths(pid))
    except OSError:
        return Found(None, "was given to it as a descriptor, into which this user may not look")
    path = paths.get(int(match[1]), "") if match else ""
    if not path.startswith("/"):
        return Found(None, "was given to it as a descriptor, and has no path")
    for name in names_here(pid, path):
        if len(os.fsencode(name)) <= LONGEST_PATH:
            return Found(UnixAddress(name), held=is_held(UnixAddress(name)))
    return Found(None, f"{path} leads nowhere from here")


def _unix_paths(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the inodes and paths of the UNIX sockets of a process's network namespace."""
    for line in Path(f"/proc/{pid}/net/unix").read_bytes().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            yield int(fields[6]), os.fsdecode(fields[7])


def _net(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None
