"""Processes of this host, named so that a pid used again is not taken for the same one."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qmpblock.errors import printable

__all__ = [
    "Peer",
    "boot_id",
    "command_line",
    "describe_process",
    "die_with_parent",
    "end_child",
    "family_of",
    "is_running",
    "kill_group",
    "pid_namespace",
    "processor_time",
    "shown_words",
    "start_time",
    "times_slept",
    "users_of",
]

_SET_PDEATHSIG = 1  # linux/prctl.h
_NAMES = "data|password|passwd|passphrase|token"
_ASKS = re.compile(rf"--?({_NAMES})")
_IN_OPTION = re.compile(rf"(?<![\w-])({_NAMES})=(?:[^,]|,,)*")  # QEMU doubles commas
_IN_JSON = re.compile(rf'("(?:{_NAMES})"\s*:\s*)"(?:[^"\\]|\\.)*"')


async def end_child(process: asyncio.subprocess.Process) -> None:
    """Kill a program of ours, if it has not ended, and wait for that. Nobody reads it any more.

    asyncio waits for the ends of its pipes, too, and does not look for that of one from which much
    came that nobody read: where a program is left in the middle of its words, that is for ever.
    """
    if process.returncode is None:
        process.kill()
        for stream in (process.stdout, process.stderr):
            while stream is not None and await stream.read(1 << 20):
                pass
    await process.wait()


def kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill a program that leads a session, and what it started: an ssh's own way to its host, say.

    To be called while somebody of it holds one of its pipes: its number is nobody else's by then.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def die_with_parent() -> Callable[[], None]:
    """Make what a child runs first (`preexec_fn`): have the kernel kill it when we are no more.

    That is when the thread ends that started it, prctl(2).
    """
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: the child may not allocate
    parent = os.getpid()

    def ask() -> None:
        prctl(_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return ask


def boot_id() -> str:
    """Return the id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def command_line(pid: int | None) -> tuple[str, ...]:
    """Return the words that a process was started with; none where that cannot be seen."""
    if pid is None:
        return ()
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ()
    return tuple(os.fsdecode(word) for word in words[:-1])


def describe_process(pid: int) -> str:
    """Say which process it is, for people: its number, and what it was started as."""
    words = shown_words(command_line(pid))
    itself = "this very process, " if pid == os.getpid() else "process "
    return f"{itself}{pid}" + (f" ({printable(words, 200)})" if words else "")


def shown_words(words: Iterable[str]) -> str:
    """Return a command line for people, without the values that are mostly keys and passwords.

    Of `-object secret,data=...`, `{"data": "..."}`, `password=...` and `--password ...`, say.
    """
    shown: list[str] = []
    for word in words:
        if shown and _ASKS.fullmatch(shown[-1]):
            shown.append("...")
        else:
            shown.append(_IN_JSON.sub(r'\1"..."', _IN_OPTION.sub(r"\1=...", word)))
    return " ".join(shown)


def pid_namespace() -> str:
    """Return the process namespace in which pids count here."""
    return str(Path("/proc/self/ns/pid").readlink())


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot (proc(5)), or None if it is gone.

    A zombie counts as gone: it holds nothing any more. One whose first thread alone has ended shows
    as a zombie, too, and is none: its other threads hold all that it has.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    state, threads, start = fields[0], int(fields[17]), int(fields[19])
    return None if state in "ZX" and threads < 2 else start


def processor_time(pid: int) -> tuple[bytes, ...]:
    """Return how much of the processor a process has used (proc(5)); nothing once it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ()
    return tuple(words[11:13])


def users_of(pid: int) -> tuple[int, ...]:
    """Return as whom a process runs: its real, effective and saved user, mostly one.

    :raise OSError: there is no such process any more.
    """
    for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
        label, *words = line.split()
        if label == b"Uid:":
            return tuple(dict.fromkeys(map(int, words[:3])))
    raise ProcessLookupError(pid)


@dataclass(frozen=True)
class Peer:
    """The process that made a listening socket, by the kernel's word (SO_PEERCRED).

    Which word is of that time. Another process may answer for it by now, and this one be something
    else: have another's rights, as a program that is set-user-ID has, or be gone, and its number
    another's. Whoever runs it could have that so.

    :ivar user: as whom it made the socket.
    """

    pid: int
    user: int
    start: int | None

    @classmethod
    def of(cls, sock: socket.socket) -> Peer | None:
        """Tell it by a connection of ours to that socket; None where the kernel does not."""
        size = struct.calcsize("3i")
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        except OSError:
            return None
        pid, user, _ = struct.unpack("3i", credentials)
        return cls(pid, user, start_time(pid)) if pid else None

    def known(self) -> int | None:
        """Return its number; None where that is not, or not only, whose it was by now.

        Root may have given its rights up.
        """
        try:
            same = not self.user or users_of(self.pid) == (self.user,)
        except OSError:
            return self.pid  # it has ended, which whoever looks for it will say
        return self.pid if same and start_time(self.pid) in (self.start, None) else None


def is_running(pid: int, start: int, boot: str) -> bool:
    """Whether exactly that process runs on this host."""
    return pid > 0 and boot == boot_id() and start_time(pid) == start


def family_of(pid: int) -> list[tuple[int, int]]:
    """Return a process and all that it has started and that still runs: number, start time.

    Not what has lost its parent, which is another's since then.
    """
    start = start_time(pid)
    if start is None:
        return []
    found = [(pid, start)]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            words = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has ended
        for word in words:
            found += family_of(int(word))
    return found


def times_slept(pid: int | None, thread: int) -> int | None:
    """Return how often a thread has gone to sleep by itself; None where that cannot be seen.

    :param thread: its id as the process itself knows it, which is another in another namespace.
    """
    try:
        text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    except OSError:
        return None
    match = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else None
