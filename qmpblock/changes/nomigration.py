"""No migration: while a change of ours lasts, QEMU refuses to migrate this VM or save its state.

A migration that begins in the middle of a change would take the images away from under it, and
nobody would be told. QEMU itself knows what must not be migrated: a node of a format that does not
support it. So a change opens one of its own, a small VDI image without content, for as long as it
lasts; to add it is atomic against migration both ways (measured, 7.2.22 and 11.1.2)::

    node there      migrate, savevm:  "The vdi format used by node 'qmpblock-RUN-no-migration'
                                       does not support live migration"
    migration       blockdev-add:     "disallowing migration blocker (migration/snapshot in
                                       progress)"

The image is an anonymous file of ours (memfd) that QEMU gets by getfd and opens by its own
/proc/self/fd: no path that it could not reach, and nothing left by whoever is killed but names of
ours. Where that cannot be had (a TCP monitor, -only-migratable, a confined QEMU), the change looks
again and again instead (`qmpblock.qemu.ownership`).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError
from qmpblock.names import blocker_name
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
    pid, name = monitor.peer_pid, blocker_name(run)
    if not monitor.can_pass_fds or pid is None:
        return False
    fd = os.memfd_create(name)
    try:
        os.write(fd, _empty_vdi())
        await monitor.pass_fd(name, fd)
        there = _descriptor(pid, name)
        if there is None:
            return False
        await monitor.execute(
            "blockdev-add",
            {
                "driver": "vdi",
                "node-name": name,
                "read-only": True,
                "file": {
                    "driver": "file",
                    "filename": f"/proc/self/fd/{there}",
                    "locking": "off",
                },
            },
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
    finally:
        os.close(fd)
        await tolerate(not_found, monitor.execute("closefd", {"fdname": name}))
    return True


async def allow_migration(monitor: Monitor, run: str) -> None:
    """Have QEMU migrate again. Idempotent."""
    name = blocker_name(run)
    await tolerate(no_node, monitor.execute("blockdev-del", {"node-name": name}))
    await tolerate(not_found, monitor.execute("closefd", {"fdname": name}))


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
