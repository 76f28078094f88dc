"""Runs of qmpblock that are still at work on this host: an interrupted playbook leaves one.

Ctrl-C ends ansible-playbook, and not what it has begun on a host: that goes on to its end, and
holds the VM's monitor, or a lock in it, until then. Whoever comes next is told by the command
itself which process that is. Of these only those are ever ended that a playbook began, which their
environment tells: what a person has begun at a terminal is theirs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

#: In the environment of every run that a module begins.
MARK = {"QMPBLOCK_STARTED_BY": "ansible"}

_IN_THE_WAY = (
    "it serves one client at a time",
    "another controller holds",
    "a backup is being made in",
)
_PROCESS = re.compile(r"\bprocess (\d+)(?: on (\S+))?")
_POLL = 0.1  # seconds between looks at whether a run has ended


class Run:
    """A run that is at work: its process, its command line, and whether a playbook began it."""

    def __init__(self, pid, start, command, by_ansible):
        self.pid = pid
        self.start = start
        self.command = command
        self.by_ansible = by_ansible

    def __str__(self):
        return f"process {self.pid} ({' '.join(self.command)})"

    def document(self):
        """Return what a module says of it."""
        return {"pid": self.pid, "command": self.command, "started_by_ansible": self.by_ansible}

    def is_there(self):
        """Whether it has not ended yet."""
        return _start_of(self.pid) == self.start


def in_the_way(code, complaint):
    """Return the runs of this host that the command has named as those that it had to give way to.

    A directory of backups may be another host's, too: its processes are none of ours.
    """
    if code not in (1, 3) or not any(words in complaint for words in _IN_THE_WAY):
        return []
    here = ("", os.uname().nodename)
    pids = sorted({int(pid) for pid, host in _PROCESS.findall(complaint) if host in here})
    return [run for run in map(look, pids) if run is not None]


def look(pid):
    """Return a run by its process; None where that is gone, or no qmpblock."""
    command = [os.fsdecode(word) for word in _read(pid, "cmdline").split(b"\0")[:-1]]
    start = _start_of(pid)
    if start is None or "qmpblock" not in [Path(word).name for word in command[:3]]:
        return None
    ((name, value),) = MARK.items()
    mark = f"{name}={value}".encode()
    return Run(pid, start, command, mark in _read(pid, "environ").split(b"\0"))


def said(found):
    """Say of runs in the way what a playbook can do about them."""
    mine = [str(one) for one in found if one.by_ansible]
    if not mine:
        return []
    return [
        "An earlier playbook began it and did not wait for its end: {}. Wait for it, or have this "
        "module end it: end_running: true".format(", ".join(mine))
    ]


def end(found):
    """End those that a playbook began, and wait until they are gone; return them.

    They undo what they have begun, for as long as that takes.
    """
    mine = [one for one in found if one.by_ansible]
    for one in mine:
        if one.is_there():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(one.pid, signal.SIGTERM)
    while any(one.is_there() for one in mine):
        time.sleep(_POLL)
    return mine


def _start_of(pid):
    """Return when a process began, in the kernel's own count; None where it has ended."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return None if len(fields) < 20 or fields[0] in (b"Z", b"X") else int(fields[19])


def _read(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
