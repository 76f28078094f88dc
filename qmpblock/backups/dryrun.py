"""A backup that is not made: all is looked at as for one, and what would be made is said.

What would be refused is refused, by the same code; and what a controller that died left on a disk,
which is undone before one is made. Its directory is read, and nothing is written there, nor made:
one that is not there yet is taken for what it would lie in. In the VM nothing is made but, for the
map of a disk of which all would be copied, an export for a moment.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from qmpblock.backups.bitmaps import goes_back_by_half
from qmpblock.backups.directory import foresee_backups
from qmpblock.backups.look import (
    BackupWords,
    check_copies,
    check_disks,
    decided,
    drafted,
    say_none,
    see,
)
from qmpblock.backups.planned import PlannedBackup, planned_backup
from qmpblock.backups.point import Point, image_names
from qmpblock.changes.backupnote import read_note
from qmpblock.copying.dryrun import dry_run as dry_copy
from qmpblock.copying.targetname import check_seen
from qmpblock.errors import Error
from qmpblock.names import backup_lock_name
from qmpblock.qemu import lock

if TYPE_CHECKING:
    from qmpblock.backups.decision import Kind
    from qmpblock.backups.directory import Backups
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["dry_run"]


async def dry_run(
    vm: Connection,
    directory: str | os.PathLike[str],
    disks: Sequence[MappedDisk],
    kind: Kind | None = None,
    **words: Unpack[BackupWords],
) -> PlannedBackup:
    """Say what a backup of running disks would be. See `VM.plan_backup`."""
    check_disks(vm, directory, disks)
    with foresee_backups(directory) as backups:
        backups.check_free()
        for error in backups.read().values():
            raise error
        backups.check_one()
        draft = await drafted(vm, backups, disks, undo=False)
        try:
            backups.check_begin(draft.when)
            return await _planned(vm, backups, draft, disks, kind, words)
        except Error as error:
            say_none(error)  # as of one that is made
            raise


async def _planned(
    vm: Connection,
    backups: Backups,
    draft: Point,
    disks: Sequence[MappedDisk],
    kind: Kind | None,
    words: BackupWords,
) -> PlannedBackup:
    gone = await _undone(vm, draft)
    seen = [one.without(gone) for one in await see(vm, disks)]
    decisions = await decided(backups, seen, kind)
    names = image_names(draft.when, [disk.name for disk in disks])
    targets = {
        disk: posixpath.join(backups.home, name) for disk, name in zip(disks, names, strict=True)
    }
    check_seen(vm.monitor.peer_pid, backups.home, to_be=backups.path)
    await check_copies(vm, backups.path, targets, words, undo=False)
    written = {
        disk: one.written
        for disk, one in zip(disks, decisions, strict=True)
        if one.written is not None
    }
    copied = await dry_copy(vm, targets, written=written, format="qcow2", **words)
    new = backups.home != backups.path
    planned = planned_backup(backups.path, draft.when, decisions, copied, new=new)
    half = goes_back_by_half(await vm.graph(), [disk.device for disk in disks])
    return planned if half is None else replace(planned, warnings=(*planned.warnings, half))


async def _undone(vm: Connection, draft: Point) -> frozenset[str]:
    """Return the names of the bitmaps that a backup left which died, and that would go first.

    :raise BusyError: one is being made.
    :raise RecordError: it cannot be read what it was about.
    """
    name = backup_lock_name(draft.backups)
    dead = await lock.look(vm.monitor, name)
    if dead is None or dead.is_idle:
        return frozenset()
    note = read_note(dead, name)
    made = note.is_made()
    if made is None:
        return frozenset()  # they stay
    return frozenset(one for _, one in (note.before if made else note.made))
