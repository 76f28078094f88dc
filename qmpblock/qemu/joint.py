"""Joint: a node of ours, and others upon it, put over a node that the guest is at work on.

QEMU 7.2 aborts (`qemu_mutex_unlock_impl: Operation not permitted`) when a node is added whose
`file` child has requests in flight in an iothread: it waits for them without that iothread's
lock. Measured on 7.2.22, under a guest's stress: raw, throttle, copy-on-read, copy-before-write,
snapshot-access, each at the first or second blockdev-add; not qcow2 over its `backing` child, of
40; 11.1.2: none of 40. blockdev-reopen takes the lock. So what is ours is built over nothing::

    filter -> joint -> nothing             filter -> joint -> the guest's node

while nobody uses it, moved into the iothread where that matters, and then the joint, a raw node
that passes everything on, is put upon the guest's node by blockdev-reopen: 120 of 120 went well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.errors import CommandError
from qmpblock.names import joint_nodes
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.iothread import iothread_of

if TYPE_CHECKING:
    from qmpblock.graph.model import Device
    from qmpblock.qemu.monitor import Monitor

__all__ = ["Joint"]


class Joint:
    """A joint, by its name."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self._monitor = monitor
        self.name = name

    async def add(self, size: int) -> None:
        """Add it, over nothing, as large as what it is for.

        :raise CommandError: QEMU refused.
        """
        joint, nothing = joint_nodes(self.name)
        for node in (
            {"driver": "null-co", "node-name": nothing, "size": size, "read-zeroes": True},
            {"driver": "raw", "node-name": joint, "file": nothing},
        ):
            await self._monitor.execute("blockdev-add", node)

    async def put_on(self, node: str, device: Device) -> None:
        """Put it, with all that has been added upon it by now, over a node of a device's.

        :raise CommandError: QEMU refused; it lies on nothing still.
        """
        joint, nothing = joint_nodes(self.name)
        reopen = {"options": [{"driver": "raw", "node-name": joint, "file": node}]}
        thread = None
        if Capabilities(self._monitor.version).adding_over_iothreads_aborts:
            iothreads = await self._monitor.execute("query-iothreads")
            thread = await iothread_of(self._monitor, device, iothreads)
        if thread is None:
            await self._monitor.execute("blockdev-reopen", reopen)
            return
        move = {"node-name": nothing, "iothread": thread}
        await self._monitor.execute("x-blockdev-set-iothread", move)
        try:
            await self._monitor.execute("blockdev-reopen", reopen)
        except CommandError:
            # Its guest does not drive the disk now, which is in the main loop, and idle, then.
            await self._monitor.execute("x-blockdev-set-iothread", move | {"iothread": None})
            await self._monitor.execute("blockdev-reopen", reopen)

    async def remove(self) -> None:
        """Remove it, once nothing lies upon it."""
        for node in joint_nodes(self.name):
            await self._monitor.execute("blockdev-del", {"node-name": node})
