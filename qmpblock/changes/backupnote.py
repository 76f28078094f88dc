"""What a backup leaves in a VM besides its copy: dirty bitmaps; and the note that undoes them.

A backup is made once its point file bears its name (`qmpblock.backups`). Until then its bitmaps are
nothing but a failed attempt's, and those of the backup before count; from then on it is the other
way round. So whoever finds the note of a controller that died looks whether that file is there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.changes.bitmaps import delete_bitmap
from qmpblock.changes.nomigration import allow_migration
from qmpblock.errors import printable
from qmpblock.host.ourfiles import Directory
from qmpblock.names import backup_when, backups_of, is_backup_bitmap, is_of_run
from qmpblock.qemu import lock
from qmpblock.qemu.refusals import no_node, tolerate

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.lock import Holder

__all__ = ["BackupNote", "delete_bitmaps", "read_note", "undo_dead_backup"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackupNote:
    """What the lock of a backup says.

    :ivar directory: of the backups, and which one it is: `device` and `inode`.
    :ivar point: the name, in it, of the file that says that this backup is made.
    :ivar made: the bitmaps that it makes, as (node, name); `before`: those that it is to replace.
    :ivar nodes: on which their beginning is drawn.
    """

    directory: str
    device: int
    inode: int
    point: str
    made: tuple[tuple[str, str], ...]
    before: tuple[tuple[str, str], ...]
    nodes: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    def is_made(self) -> bool | None:
        """Whether the backup is; None where its directory is not there, or another one is."""
        try:
            with Directory(self.directory) as there:
                status = os.fstat(there.fd)
                if (status.st_dev, status.st_ino) != (self.device, self.inode):
                    return None
                return there.status(self.point) is not None
        except OSError:
            return None


def read_note(dead: Holder, name: str) -> BackupNote:
    """Return what the holder of the lock of a backup says, which may be anybody in that QEMU.

    :param name: of the lock.
    :raise RecordError: it is not what this version understands, or tells of what is not ours.
    """
    note, backups = dead.says(BackupNote, name), backups_of(name)
    said = backup_when(note.point)
    ours = said is not None and said[1]
    ours = ours and all(is_backup_bitmap(one, backups) for _, one in (*note.made, *note.before))
    if not (ours and all(is_of_run(one, dead.run) for one in note.nodes)):
        raise lock.unreadable(name, "it tells of what is not a backup's", dead.run)
    return note


async def delete_bitmaps(vm: Connection, bitmaps: Iterable[tuple[str, str]]) -> None:
    """Remove dirty bitmaps of ours, as (node, name). Idempotent.

    :raise CommandError: QEMU refused: somebody uses one.
    """
    for node, name in bitmaps:
        await delete_bitmap(vm, node, name)


async def undo_dead_backup(vm: Connection, dead: Holder, name: str) -> None:
    """Remove the bitmaps of a backup that died, or, where it is made, those before it. Idempotent.

    Where that cannot be told, all stay: the next backup into that directory knows which count.

    :param name: of the lock.
    :raise RecordError: what it was about cannot be read: nothing is touched.
    """
    if dead.is_idle:
        return  # it died before it did anything
    note = read_note(dead, name)
    for node in note.nodes:
        await tolerate(no_node, vm.monitor.execute("blockdev-del", {"node-name": node}))
    await allow_migration(vm.monitor, dead.run)  # by that name such a node's image came, too
    made = note.is_made()
    if made is None:
        _log.warning(
            "a backup into %s was broken off, and that directory cannot be seen: its dirty bitmaps "
            "stay in the VM; the next backup into it removes those that it does not need",
            printable(note.directory),
        )
        return
    await delete_bitmaps(vm, note.before if made else note.made)
