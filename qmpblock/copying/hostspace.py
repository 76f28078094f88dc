"""Whether a closed image has the host space that was asked for: thin, in full, or like another.

What an image holds its own map says; that a range which it calls data is none on the host (qcow2
with preallocated metadata) only the file's blocks show, so for "full" these have to suffice, too.

QEMU writes the first block of every raw file that it makes, to find out later how direct I/O has
to be aligned there: that one is never too much.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qmpblock.errors import RequestError
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.host.closedimage import ClosedImage

__all__ = ["HostSpace", "check_full", "check_like", "check_thin", "space_of", "verify_space"]

_FIRST = Ranges([(0, 4096)])  # file-posix.c, allocate_first_block
_BLOCK = 512  # bytes; what st_blocks counts


@dataclass(frozen=True)
class HostSpace:
    """What an image has that was not asked for, and what was asked for that it has not.

    :ivar excess: has host space, and should not.
    :ivar lacking: should have host space, and has not.
    :ivar short: bytes by which the blocks of its file are fewer than what it says it holds, where
        they were counted: host space that is missing nobody knows where.
    """

    excess: Ranges
    lacking: Ranges
    short: int = 0

    @property
    def as_asked(self) -> bool:
        """Whether it is as it was asked for."""
        return not (self.excess.total or self.lacking.total or self.short)


def space_of(own: AllocationMap) -> Ranges:
    """Return what a layer holds with host space for it: data, and zeros that are reserved.

    :param own: of the layer alone, with what is reserved.
    """
    return own.where(data=True).union(own.where(reserved=True))


def check_thin(own: AllocationMap, wanted: Ranges, cluster: int) -> HostSpace:
    """Whether a layer holds no more than it has to.

    :param own: of the layer alone, with what is reserved.
    :param wanted: what it was to hold; a copy's source data.
    :param cluster: bytes; what is wanted counts in whole ones.
    """
    return HostSpace(_excess(space_of(own), wanted.align_out(cluster, own.stop)), Ranges())


def check_full(own: AllocationMap, blocks: int | None = None) -> HostSpace:
    """Whether every byte of a layer has host space.

    :param own: of the layer alone, with what is reserved.
    :param blocks: bytes that its file has on the host; None: not counted. Metadata are among
        them, so that a few blocks may be missing and not be seen.
    """
    held = space_of(own)
    lacking = held.complement(own.start, own.length)
    short = 0 if blocks is None else max(0, held.total - blocks)
    return HostSpace(Ranges(), lacking, short)


def check_like(
    own: AllocationMap, model: AllocationMap, cluster: int, *, written: bool = False
) -> HostSpace:
    """Whether a layer has host space where another has it.

    :param own: of the layer alone, with what is reserved; also `model`, of the other.
    :param cluster: bytes; either may have more by less than one at any end.
    :param written: whether somebody wrote to the other since: then it may hold more data.
    """
    held, wanted = space_of(own), space_of(model)
    allowed = wanted.union(own.data()) if written else wanted
    return HostSpace(
        _excess(held, allowed.align_out(cluster, own.stop)),
        wanted.clip(own.start, own.length).difference(held.align_out(cluster, own.stop)),
    )


async def verify_space(
    image: ClosedImage,
    asked: Literal["thin", "full"] | AllocationMap,
    *,
    wanted: Ranges | None = None,
    cluster: int = 64 << 10,
    written: bool = False,
) -> HostSpace:
    """Look at what the active layer of a closed image holds.

    :param asked: an AllocationMap: host space where that one has it (`AllocationMap.own`).
    :param wanted: with "thin": what it was to hold; None: what is no zeros in its own map.
    :param cluster: bytes; the largest unit in which it may have got host space.
    :param written: with a map: see `check_like`.
    :raise RequestError: it is asked for something else.
    :raise Error: see `qmpblock.closed_image`.
    """
    [top, *_] = await image.layers(reserved=True)
    if isinstance(asked, AllocationMap):
        return check_like(top.map, asked, cluster, written=written)
    if asked == "thin":
        return check_thin(top.map, top.map.data() if wanted is None else wanted, cluster)
    if asked == "full":
        return check_full(top.map, _blocks_of(top.file))
    raise RequestError(f"{asked!r} is neither thin nor full, nor a map")


def _excess(held: Ranges, allowed: Ranges) -> Ranges:
    return held.difference(allowed).difference(_FIRST)


def _blocks_of(file: str) -> int | None:
    """Return how many bytes a file has on the host; None of a block device, which has them all."""
    try:
        status = os.stat(file)  # noqa: PTH116  it may be a json: name
    except OSError:
        return None
    return status.st_blocks * _BLOCK if os.path.isfile(file) else None  # noqa: PTH113
