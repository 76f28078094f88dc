"""Kept: mirrors that an attempt left for another one to go on with; found, and believed or not.

Where a migration fails before its mirrors are ended, and a storage daemon had the destination's
images, the mirrors stay, paused (`qmpblock.migration.storage.Storage.keep`). What they were told
is written is in the images, for the daemon has ended by itself; what they were not told, and what
the guest writes from then on, they know. So another attempt copies that alone, to whatever
destination has the very same images, untouched since.

What says so is in the locks of the disks (`qmpblock.changes.copies.Migration.kept`), whose holder
is dead: whoever else is to do anything with a disk undoes it as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.changes.copies import Migration
from qmpblock.changes.leftovers import record_of
from qmpblock.copying.wire import wire_socket
from qmpblock.errors import UnsupportedError
from qmpblock.migration.imagedaemon import ImageDaemon
from qmpblock.migration.imageserver import ImageServer
from qmpblock.migration.serverthere import ServerThere
from qmpblock.names import lock_names, wire_node
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = ["Kept", "find_kept"]


@dataclass(frozen=True)
class Kept:
    """What one attempt left.

    :ivar holder: of the disks' locks, which is dead.
    """

    holder: Holder
    record: Migration

    async def fits(self, destination: Connection, disks: Sequence[DiskDevice]) -> bool:
        """Whether these disks of a destination are what its mirrors have written to, as it was.

        :param disks: in the order of the mirrors.
        """
        record, numbers = self.record, range(len(disks))
        wires = tuple((wire_node(record.run, n), wire_socket(record.run, n)) for n in numbers)
        if wires != record.wires[: len(wires)] or len(disks) != len(record.kept):
            return False  # of another TMPDIR, say
        forward = destination.monitor.forward
        try:
            server: ImageDaemon = (
                await ImageServer.of(destination, record.run, disks)
                if forward is None
                else await ServerThere.of(destination, forward, record.run, disks)
            )
        except UnsupportedError:
            return False
        return server.marks() == record.kept


async def find_kept(source: Connection, disks: Sequence[DiskDevice]) -> Kept | None:
    """Return what an attempt left of these disks; None where there is none, or not of them all.

    :raise RecordError: what is left cannot be read.
    """
    names = lock_names(disks)
    held = [await lock.read(source.monitor, name) for name in names]
    if not held or not isinstance(held[0], Holder) or not held[0].is_dead():
        return None
    if any(not isinstance(one, Holder) or one.run != held[0].run for one in held):
        return None
    record = record_of(held[0], names[0])
    if not isinstance(record, Migration) or not record.kept or set(record.locks) != set(names):
        return None
    return Kept(held[0], record)
