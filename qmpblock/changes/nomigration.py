"""No migration: while a change of ours lasts, QEMU refuses to migrate this VM or save its state.

A migration that begins in the middle of a change would take the images away from under it, and
nobody would be told. QEMU itself knows what must not be migrated: a node of a format that does not
support it. So a change opens one of its own, a small VDI image without content, for as long as it
lasts; to add it is atomic against migration both ways (measured, 7.2.22 and 11.1.2)::

    node there      migrate, savevm:  "The vdi format used by node 'qmpblock-RUN-no-migration'
                                       does not support live migration"
    migration       blockdev-add:     "disallowing migration blocker (migration/snapshot in
                                       progress)"

The image is in memory (`qmpblock.qemu.memorynode`), so that nothing is left by whoever is killed
but names of ours. Where that cannot be had (a TCP monitor, -only-migratable, a confined QEMU), the
change looks again and again instead (`qmpblock.qemu.ownership`).
"""

from __future__ import annotations

import os
import struct

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError
from qmpblock.host.contents import Contents
from qmpblock.names import blocker_name
from qmpblock.qemu.memorynode import add_memory_node
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import (
    duplicate_node,
    migration_in_progress,
    no_node,
    not_found,
    tolerate,
)

__all__ = ["allow_migration", "forbid_migration"]

_UNIT = 1 << 20  # bytes of the one block that the image has


async def forbid_migration(monitor: Monitor, run: str) -> bool:
    """Have QEMU refuse migrations from now on; False where it cannot be had. Idempotent.

    :raise UnsupportedError: one is under way; nothing was touched.
    """
    image, name = _empty_vdi(), blocker_name(run)
    try:
        return await add_memory_node(
            monitor, name, "vdi", Contents(len(image), ((0, image),)), descriptor=name
        )
    except CommandError as error:
        if migration_in_progress(error):
            raise UnsupportedError(
                "this VM is being migrated, or its state saved; its images may change hands at any "
                "moment",
                standing=UNTOUCHED,
                remedy="wait for its end, or cancel it (migrate_cancel); then run this again, on "
                "the VM in which the guest goes on",
            ) from None
        return duplicate_node(error)  # it is there: that of a run that is carried on


async def allow_migration(monitor: Monitor, run: str) -> None:
    """Have QEMU migrate again. Idempotent."""
    name = blocker_name(run)
    await tolerate(no_node, monitor.execute("blockdev-del", {"node-name": name}))
    await tolerate(not_found, monitor.execute("closefd", {"fdname": name}))


def _empty_vdi() -> bytes:
    """Return a VDI image of one block that it does not hold: header, and a map of one entry."""
    header = struct.pack(
        "<64sIIIII256sIIIIIIIQIIII32s",
        b"<<< QEMU VM Virtual Disk Image >>>\n",
        0xBEDA107F,  # signature
        0x00010001,  # version 1.1
        0x180,  # bytes of the header
        1,  # dynamic
        0,
        b"",
        512,  # offset of the map
        1024,  # offset of the data
        *(0, 0, 0),
        512,  # bytes of a sector
        0,
        _UNIT,  # bytes of the disk
        _UNIT,  # bytes of a block
        0,
        *(1, 0),  # blocks, and those that are allocated
        os.urandom(32),  # its id, and that of its last snapshot; no links
    )
    return header.ljust(512, b"\0") + b"\xff\xff\xff\xff".ljust(512, b"\0")
