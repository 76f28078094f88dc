"""What `qmpblock backup list` and `check` say, and `qmpblock restore`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.backups.check import BackupsChecked
    from qmpblock.backups.point import Point

__all__ = ["checked_document", "list_document", "said_checked", "said_points"]


def list_document(directory: str, points: Sequence[Point]) -> dict[str, Any]:
    """Return the document of docs/schema/backup-list.schema.json."""
    return {
        "directory": os.path.abspath(directory),  # noqa: PTH100  links stay
        "points": [point.as_json() for point in points],
    }


def said_points(points: Sequence[Point]) -> Iterator[str]:
    """Say which backups there are."""
    for point in points:
        yield f"{point.when}: {printable(point.vm.name) or 'the VM'} as of {point.time}"
        for one in point.disks:
            below = "full" if one.parent is None else f"incremental, on {printable(one.parent)}"
            yield (
                f"  {printable(one.disk)}: {printable(one.file)}, {human_size(one.length)} of "
                f"{human_size(one.size)}, {below}"
            )
    yield f"{len(points)} backup{'' if len(points) == 1 else 's'}"


def checked_document(found: BackupsChecked) -> dict[str, Any]:
    """Return the document of docs/schema/backup-check.schema.json."""
    return asdict(found) | {"whole": found.whole}


def said_checked(found: BackupsChecked) -> Iterator[str]:
    """Say which backups are whole."""
    for why in found.unread:
        yield f"not read: {why}"
    for point in found.points:
        if not point.faults:
            yield f"{point.when}: whole"
        for fault in point.faults:
            yield f"{point.when}: {fault}"
    if found.underway is not None:
        when = found.underway.when or "a backup"
        yield f"{when}: being made, by {printable(found.underway.by)}; it is none yet"
    for name in found.others:
        yield f"no backup tells of {printable(name)}"
    whole = sum(not point.faults for point in found.points)
    yield (
        f"{whole} of {len(found.points)} backups are whole; {human_size(found.read)} were read in "
        f"{found.seconds:.1f} s"
    )
