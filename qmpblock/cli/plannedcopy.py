"""Lines that say what a copy would be: of `qmpblock copy --dry-run`, and of `qmpblock plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.copying.planned import PlannedCopy, Room

__all__ = ["said", "said_amount"]

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
        yield f"  {said_amount(one.read, one.write)}" + _said_room(one.room)
        if one.kept is not None:
            kept = _KEPT[planned.way]
            place, needed = printable(one.kept.path), human_size(one.kept.needed)
            free = human_size(one.kept.free)
            yield f"  {kept.format(place=place, needed=needed)}; {free} are free"
        if one.relayed:
            yield "  by NBD: whether the server answers, and has room, is not tried beforehand"
    yield f"by {planned.way}: {planned.why}"
    for text in planned.guest:
        yield f"the guest: {text}"
    if planned.seconds is not None:
        yield (
            f"{planned.seconds:.0f} s at {human_size(planned.speed)}/s"
            + (", which counts zeros, too" if _counts_zeros(planned) else "")
            + ("; to compare it takes about as long again" if planned.verify else "")
        )


def _counts_zeros(planned: PlannedCopy) -> bool:
    counted = (planned.seconds or 0) * planned.speed
    return planned.write is not None and counted > planned.write


def said_amount(read: int | None, write: int | None) -> str:
    """Say how much is to be moved."""
    if read is None or write is None:
        return "how much there is to read cannot be told beforehand"
    return f"{human_size(read)} to read, {human_size(write)} to write"


def _said_room(room: Room | None) -> str:
    if room is None:
        return ""
    needed, free = human_size(room.needed), human_size(room.free)
    return f"; room: {needed} in {printable(room.path)}, where {free} are free"
