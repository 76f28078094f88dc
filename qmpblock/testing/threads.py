"""What the threads of a process wait for, by /proc alone: where its monitor is silent, too."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from qmpblock.errors import printable

__all__ = ["threads"]

_STACK = 8  # functions of the kernel's stack that are shown

_STATES = {"D": "waits for storage, and no signal reaches it,", "T": "is stopped", "S": "waits"}
_CALLS = {  # of x86-64; on others the number is told
    0: "read",
    1: "write",
    7: "poll",
    16: "ioctl",
    17: "pread64",
    18: "pwrite64",
    35: "nanosleep",
    42: "connect",
    45: "recvfrom",
    46: "sendmsg",
    47: "recvmsg",
    72: "fcntl",
    73: "flock",
    74: "fsync",
    75: "fdatasync",
    77: "ftruncate",
    202: "futex",
    230: "clock_nanosleep",
    257: "openat",
    271: "ppoll",
    285: "fallocate",
    295: "preadv",
    296: "pwritev",
    426: "io_uring_enter",
}
_NOT_ABOUT_A_FILE = {"poll", "nanosleep", "futex", "clock_nanosleep", "openat", "ppoll"}
_ENTRY = {"do_syscall_64", "entry_SYSCALL_64_after_hwframe"}


def threads(pid: int) -> list[str]:
    """Say what each thread of a process waits for, those that wait alike in one line.

    The system call, the file that it is about, and where in the kernel it waits; root sees the
    kernel's stack, too (`/proc/PID/task/*/`: comm, stat, syscall, wchan, stack).
    """
    waiting: dict[str, list[str]] = {}
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        try:
            what = _waits_for(pid, task)
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        waiting.setdefault(what, []).append(task.name)
    return [f"threads: {len(ids)} {what} ({ids[0]})" for what, ids in waiting.items()]


def _waits_for(pid: int, task: Path) -> str:
    name = printable((task / "comm").read_text().strip())
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    doing = f"{name} {_STATES.get(state, f'is in state {state}')}"
    try:
        words = (task / "syscall").read_text().split()
    except PermissionError:  # of another user's, or it may not be traced
        return doing
    if words[0] == "running":
        return f"{name} runs"
    number = int(words[0]) if os.uname().machine == "x86_64" else -1
    call = _CALLS.get(number, f"system call {words[0]}")
    about = ""
    if call in _CALLS.values() and call not in _NOT_ABOUT_A_FILE:
        with contextlib.suppress(OSError):
            file = Path(f"/proc/{pid}/fd/{int(words[1], 16)}").readlink()
            about = f" of {printable(str(file))}"
    return f"{doing} in {call}{about}, at {_where(task)}"


def _where(task: Path) -> str:
    try:
        stack = re.findall(r"\] ([\w.]+)", (task / "stack").read_text())
    except PermissionError:  # only root sees it
        stack = []
    shown = [function for function in stack if function not in _ENTRY][:_STACK]
    place = (task / "wchan").read_text().strip()  # 0: it may not be seen
    return " < ".join(shown) or (place if place != "0" else "an unknown place")
