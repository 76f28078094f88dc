"""Processes of this host, named so that a pid used again is not taken for the same one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from qmpblock.errors import printable

__all__ = [
    "boot_id",
    "command_line",
    "describe_process",
    "is_running",
    "pid_namespace",
    "shown_words",
    "start_time",
    "times_slept",
]

_NAMES = "data|password|passwd|passphrase|token"
_ASKS = re.compile(rf"--?({_NAMES})")
_IN_OPTION = re.compile(rf"(?<![\w-])({_NAMES})=(?:[^,]|,,)*")  # QEMU doubles commas
_IN_JSON = re.compile(rf'("(?:{_NAMES})"\s*:\s*)"(?:[^"\\]|\\.)*"')


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

    A zombie counts as gone: it holds nothing any more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(pid: int, start: int, boot: str) -> bool:
    """Whether exactly that process runs on this host."""
    return pid > 0 and boot == boot_id() and start_time(pid) == start


def times_slept(pid: int | None, thread: int) -> int | None:
    """Return how often a thread has gone to sleep by itself; None where that cannot be seen.

    :param thread: its id as the process itself knows it, which is another in another namespace.
    """
    try:
        text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
