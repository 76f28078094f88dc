"""A copy that has filled the file system on which the guest's own images grow is given up.

Elsewhere it waits for room, and its guest knows nothing of that. There its guest would wait, too:
the next write that needs a new cluster stops the VM, until somebody makes room and has it go on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import Error, printable
from qmpblock.graph.places import Place
from qmpblock.host.openfiles import OpenFiles

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["check_crowded"]


async def check_crowded(vm: Connection, target: CopyTarget) -> None:
    """Refuse to wait for room where the guest of a copy that is under way would have none, either.

    :param target: which has no room.
    :raise Error: an image to which the VM writes lies on the same file system.
    """
    if not isinstance(target, TargetFile):
        return
    graph, files = await vm.graph(), OpenFiles(vm.monitor.peer_pid)
    here = os.fstat(target.directory.fd).st_dev
    for disk in graph.disks():
        active = disk.chain.active
        for node in (active.storage, active.data_file):
            place = None if node is None or disk.read_only else files.place(node)
            if isinstance(place, Place) and (place.file.device, place.file.is_device) == (
                here,
                False,
            ):
                stopped = (await vm.monitor.execute("query-status"))["status"] == "io-error"
                raise Error(
                    f"the file system of {printable(target.plan.file)} is full, and "
                    f"{printable(place.here)} grows there, too: the copy does not wait for room",
                    remedy="copy to another file system, or make room there"
                    + (
                        "; the VM stands, as a write of its guest's found none: when there is, "
                        'have it go on (QMP: {"execute": "cont"})'
                        if stopped
                        else ""
                    ),
                )
