"""What to do to ranges of a disk, from its map. Pure.

*Below* is what the active layer does not hold and some layer under it supplies: data, explicit
zeros, and what a short layer hides past its end (NBD's allocation depth 2 and more). What no
layer holds is not below, and a thin allocation leaves it blank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.ranges import Ranges

__all__ = ["Batch", "below", "dataless", "growth_warning", "requests", "rounded"]


@dataclass(frozen=True)
class Batch:
    """One range to be brought into the active layer by one request.

    :ivar data: whether it is data; else zeros.
    """

    start: int
    stop: int
    data: bool

    @property
    def length(self) -> int:
        """In bytes."""
        return self.stop - self.start


def rounded(offset: int, length: int, cluster: int, size: int) -> tuple[int, int]:
    """Round a range outwards to whole clusters of the active layer; offset and length.

    :param size: of the disk; a last cluster that it cuts stays cut.
    """
    if not length:
        return offset, 0
    start = offset - offset % cluster
    stop = min(-(-(offset + length) // cluster) * cluster, size)
    return start, max(stop, offset + length) - start


def below(amap: AllocationMap) -> Ranges:
    """Return what some layer under the active one supplies, or hides by being short."""
    hidden = amap.where(amap.depth < amap.layers - 1, present=False)
    return amap.not_in_active() | hidden


def dataless(amap: AllocationMap, cluster: int, size: int) -> Ranges:
    """Return the whole clusters in which no layer holds data: what a full allocation reserves.

    Zero clusters that have host space already are among them: no live map tells those.
    """
    return amap.where(data=False).align_in(cluster, size)


def growth_warning(bitmap: str, total: int) -> str:
    """Say that a dirty bitmap will count what is reserved as written."""
    return (
        f"the dirty bitmap {printable(bitmap)} counts what is reserved, up to {total} bytes, as "
        "written: the next incremental backup is as much larger"
    )


def requests(
    amap: AllocationMap,
    cluster: int,
    size: int,
    limit: int,
    zero_limit: int = 0,
    *,
    where: Ranges | None = None,
) -> Iterator[Batch]:
    """Yield the requests that bring all that is below into the active layer, in order.

    Cut along the map's edges: one request over data and zeros would store the zeros as data
    (F9). A cluster that has both is data.

    :param cluster: of the active layer, in bytes; a request holds whole ones.
    :param size: of the disk.
    :param limit: bytes of one request; a multiple of the cluster, or one cluster is taken.
    :param zero_limit: the same of zeros, where it is more.
    :param where: whole clusters, to which it is confined.
    """
    wanted = below(amap) if where is None else below(amap) & where
    if not wanted:
        return
    data = (wanted & amap.data()).align_out(cluster, size)
    zeros = wanted.align_out(cluster, size) - data
    steps = [max(cluster, most - most % cluster) for most in (limit, max(limit, zero_limit))]
    batches = [Batch(start, stop, True) for start, stop in data.split(steps[0])]
    batches += [Batch(start, stop, False) for start, stop in zeros.split(steps[1])]
    batches.sort(key=lambda batch: batch.start)
    yield from batches
