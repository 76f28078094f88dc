"""A monitor that another run of qmpblock holds: which it is, and what it is about.

A monitor serves one client at a time, and a long run keeps it for as long as it takes. The
process is found on this host (`qmpblock.host.socketholders`); what it is about its journal tells.
"""

from __future__ import annotations

from pathlib import Path

from qmpblock.address import MonitorAddress, parse_monitor
from qmpblock.changes.survey import journals
from qmpblock.errors import MonitorHeldError
from qmpblock.host.processes import command_line
from qmpblock.sockets import absolute

__all__ = ["tell_of_our_own"]


def tell_of_our_own(error: MonitorHeldError, address: str | MonitorAddress) -> None:
    """Have an error say what a run of ours that holds the monitor is about, and how to end it.

    It is left as it is where no run of ours can be seen.
    """
    where = absolute(parse_monitor(address) if isinstance(address, str) else address)
    begun = sorted(
        {found.record.describe() for found in journals() if found.record.vm.monitor == where}
    )
    if begun:
        error.standing = (
            f"begun by this monitor, by a run that is at work or died: {', '.join(begun)}; nothing "
            "was touched"
        )
    ours = " ".join(str(pid) for pid in error.holders if _is_the_command(pid))
    if ours:
        error.remedy = (
            f"wait for it, or end it: kill -INT {ours} (it undoes what it began, and no write is "
            f"lost). To work beside it, {error.remedy}"
        )


def _is_the_command(pid: int) -> bool:
    """Whether it is `qmpblock ...`, `python .../qmpblock ...` or `python -m qmpblock ...`."""
    return "qmpblock" in [Path(word).name for word in command_line(pid)[:3]]
