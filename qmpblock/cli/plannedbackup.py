"""Lines that say what a backup would be: of `qmpblock backup --dry-run`."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpblock.cli.plannedcopy import said_amount, said_kept, said_room, said_time
from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.backups.planned import PlannedBackup, PlannedDiskBackup

__all__ = ["said"]


def said(planned: PlannedBackup) -> Iterator[str]:
    """Yield the lines."""
    for one in planned.disks:
        yield (
            f"{printable(one.disk)}: would be backed up to "
            f"{printable(posixpath.basename(one.target))}, {human_size(one.size)}, {_kind(one)}"
            + ("; then compared with the disk" if planned.verify else "")
        )
        most = "" if one.read is None else "at most "
        yield f"  {most}{said_amount(one.read, one.write)}{said_room(one.room)}"
        if one.kept is not None:
            yield f"  {said_kept(one.kept, planned.way)}"
    yield f"by {planned.way}: {planned.why}"
    for text in planned.guest:
        yield f"the guest: {text}"
    if planned.seconds is not None:
        yield said_time(planned.seconds, planned.speed, planned.write, verify=planned.verify)
    place = printable(planned.directory)
    yield (
        f"in {place}{', which would be made' if planned.new else ''}; files are called by the time "
        "at which it begins"
    )


def _kind(one: PlannedDiskBackup) -> str:
    if one.parent is None:
        return f"full: {one.reason}"
    return f"incremental, on {printable(one.parent)}"
