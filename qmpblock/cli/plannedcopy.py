"""Lines that say what a copy would be: of `qmpblock copy --dry-run`, and of `qmpblock plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.copying.planned import PlannedCopy, Room, Way

__all__ = ["said", "said_amount", "said_kept", "said_room", "said_time"]

_OF = {
    "start": "as it is when the copy begins",
    "end": "as it is when the copy ends",
    "pivot": "as it is when the copy ends, and the guest goes over to it",
}
_KEPT = {
    "views": "what the guest overwrites meanwhile is kept in {place}, up to {needed}",
    "frozen layers": "what the guest writes meanwhile goes to an overlay in {place}, where "
    "{needed} must be free",
}


def said(planned: PlannedCopy) -> Iterator[str]:
    """Yield the lines."""
    for one in planned.disks:
        yield (
            f"{printable(one.disk)}: would be copied to {printable(one.target)}, {one.format}, "
            f"{human_size(one.size)}, {_OF[planned.point]}"
            + ("; then compared with it" if planned.verify else "")
        )
        yield f"  {said_amount(one.read, one.write)}" + said_room(one.room)
        if one.kept is not None:
            yield f"  {said_kept(one.kept, planned.way)}"
        if one.relayed:
            yield "  by NBD: whether the server answers, and has room, is not tried beforehand"
    yield f"by {planned.way}: {planned.why}"
    for text in planned.guest:
        yield f"the guest: {text}"
    if planned.seconds is not None:
        yield said_time(planned.seconds, planned.speed, planned.write, verify=planned.verify)


def said_time(seconds: float, speed: int, write: int | None, *, verify: bool) -> str:
    """Say how long it takes.

    :param write: bytes to be written, of all disks; None where that cannot be said.
    """
    counts_zeros = write is not None and seconds * speed > write
    return (
        f"{seconds:.0f} s at {human_size(speed)}/s"
        + (", which counts zeros, too" if counts_zeros else "")
        + ("; to compare it takes about as long again" if verify else "")
    )


def said_amount(read: int | None, write: int | None) -> str:
    """Say how much is to be moved."""
    if read is None or write is None:
        return "how much there is to read cannot be told beforehand"
    return f"{human_size(read)} to read, {human_size(write)} to write"


def said_kept(kept: Room, way: Way) -> str:
    """Say where goes what the guest writes meanwhile."""
    place, needed = printable(kept.path), human_size(kept.needed)
    return f"{_KEPT[way].format(place=place, needed=needed)}; {human_size(kept.free)} are free"


def said_room(room: Room | None) -> str:
    """Say what room a target needs, behind how much is to be moved."""
    if room is None:
        return ""
    needed, free = human_size(room.needed), human_size(room.free)
    return f"; room: {needed} in {printable(room.path)}, where {free} are free"
