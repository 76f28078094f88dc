"""Nodes over images of ours in memory: a file that has no name, and that QEMU alone has open.

QEMU gets an anonymous file (memfd) by getfd and opens it by its own /proc/self/fd: no path that it
could not reach, nothing on any disk, and nothing left by whoever is killed but names of ours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.qemu.refusals import not_found, tolerate

if TYPE_CHECKING:
    from qmpblock.host.contents import Contents
    from qmpblock.qemu.monitor import Monitor

__all__ = ["add_memory_node"]


async def add_memory_node(
    monitor: Monitor, node: str, driver: str, image: Contents, *, descriptor: str
) -> bool:
    """Have QEMU open an image that is in memory, to read it; False where that cannot be had.

    It cannot by a TCP monitor, or of a QEMU whose descriptors are not seen from here.

    :param node: the node's name; its file has none.
    :param descriptor: by which QEMU knows the file until it has opened it. Whoever undoes a run
        that was killed in between closes it; two at a time must not have the same (K1).
    :raise CommandError: QEMU refused it, as a confined one does.
    """
    pid = monitor.peer_pid
    if not monitor.can_pass_fds or pid is None:
        return False
    fd = os.memfd_create(node)
    try:
        image.write_to(fd)
        await monitor.pass_fd(descriptor, fd)
        there = _descriptor(pid, node)
        if there is None:
            return False
        await monitor.execute(
            "blockdev-add",
            {
                "driver": driver,
                "node-name": node,
                "read-only": True,
                "file": {
                    "driver": "file",
                    "filename": f"/proc/self/fd/{there}",
                    "locking": "off",
                },
            },
        )
    finally:
        os.close(fd)
        await tolerate(not_found, monitor.execute("closefd", {"fdname": descriptor}))
    return True


def _descriptor(pid: int, name: str) -> str | None:
    """Return the number under which a process has an anonymous file of that name open."""
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if str(entry.readlink()).startswith(f"/memfd:{name} "):
                    return entry.name
            except FileNotFoundError:
                continue  # closed since it was listed
    except OSError:
        pass  # of another user, or in a namespace that we do not see
    return None
