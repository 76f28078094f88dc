"""QEMU's own qemu-io, on a node of a running VM: for what QMP has no command.

It runs in the VM, with what the node has open, and prints what went wrong. Its `reopen` keeps all
options that it is not given, where blockdev-reopen gives them their defaults; and it takes nodes
that QEMU named itself (those of -drive), which that refuses (F14).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qmpblock.errors import UnsupportedError, printable

if TYPE_CHECKING:
    from qmpblock.qemu.monitor import Monitor

__all__ = ["check_taken", "line_of", "qemu_io", "takes"]

# What QEMU lets a node be called, by people or by itself.
_NODE_NAME = re.compile(r"[A-Za-z#][A-Za-z0-9_.-]*")


def takes(node: str) -> bool:
    """Whether a node's name can be put on a command line. Pure."""
    return _NODE_NAME.fullmatch(node) is not None


def check_taken(node: str) -> None:
    """Refuse a node's name that cannot be put on a command line. Pure.

    :raise UnsupportedError: it is such a one.
    """
    if not takes(node):
        raise UnsupportedError(
            f"the name of the node {printable(node)} cannot be put on a command line"
        )


def line_of(node: str, command: str) -> dict[str, str]:
    """Return the arguments of human-monitor-command that run one of qemu-io's. Pure.

    :param command: what is not our own word in it was checked.
    :raise UnsupportedError: the node's name cannot be put on a command line.
    """
    check_taken(node)
    return {"command-line": f'qemu-io {node} "{command}"'}


async def qemu_io(monitor: Monitor, node: str, command: str) -> str:
    """Run one of qemu-io's commands on a node; return what it said: nothing where all went well.

    :raise UnsupportedError: see `line_of`.
    :raise Error: QEMU did not run it.
    """
    said: str = await monitor.execute("human-monitor-command", line_of(node, command))
    return said.strip()
