"""Merging the two block-status contexts of a QEMU export into what qemu-img would say.

A reply holds at most 131072 extents a context, so the two may stop at different offsets.
What the longer one says beyond the shorter is dropped, and asked for again::

    base:allocation        |--------|-----|------|
    qemu:allocation-depth  |----|-------|
                           ^            ^
                           offset       where the next request starts

With d the NBD depth (0 absent, 1 the exported node), and an extent split where the node
that it names ends:

====================================  ============  =======  =====  ========
what NBD says                         depth         present  zero   data
====================================  ============  =======  =====  ========
d = 0                                 the last one  no       yes    no
d >= 1, at or past that node's end    of d - 1      no       yes    no
d >= 1                                of d          yes      ZERO   not HOLE
====================================  ============  =======  =====  ========

The middle row: QEMU says that a layer shorter than its overlay itself holds the zeros past
its end (bdrv_co_common_block_status_above); qemu-img, that the overlay does not hold them
and nothing below can supply them.

Sources: the NBD protocol, "Metadata querying" and `base:allocation`; QEMU's docs/interop/nbd.rst.
Pure: NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmpblock.errors import NBDProtocolError, RequestError
from qmpblock.extents.records import DATA, PRESENT, ZERO

__all__ = ["Merged", "Nodes", "merge"]

_STATE_HOLE, _STATE_ZERO = 1, 2  # flags of base:allocation


class Nodes(NamedTuple):
    """The nodes that NBD depths count, the exported one (d = 1) first.

    :ivar sizes: virtual size of each, int64.
    :ivar levels: the depth in the map that each goes by, int32, ascending.
    """

    sizes: npt.NDArray[np.int64]
    levels: npt.NDArray[np.int32]

    @classmethod
    def of(cls, sizes: Sequence[int], levels: Sequence[int] | None = None) -> Nodes:
        """Check and gather them; without `levels` they are 0, 1, 2, ...

        :raise RequestError: there is none, or the levels are not one for each, ascending
            from 0 by at most 1.
        """
        made = cls(
            np.array(sizes, np.int64),
            np.arange(len(sizes), dtype=np.int32) if levels is None else np.array(levels, np.int32),
        )
        steps = np.diff(made.levels)
        if not len(sizes) or len(made.levels) != len(sizes):
            raise RequestError(f"{len(made.levels)} levels for {len(sizes)} nodes of a chain")
        if made.levels[0] != 0 or np.any((steps < 0) | (steps > 1)):
            raise RequestError("the levels of a chain's nodes must ascend from 0 by at most 1")
        return made

    @property
    def layers(self) -> int:
        """How many layers the chain has."""
        return int(self.levels[-1]) + 1


class Merged(NamedTuple):
    """Adjacent extents up to `stop`; equal neighbours are not merged yet."""

    starts: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]
    stop: int


def merge(
    base: npt.NDArray[Any], depth: npt.NDArray[Any], offset: int, length: int, nodes: Nodes
) -> Merged:
    """Merge one reply, as far as both contexts reach and at most `length` bytes.

    :param base: integers of shape (n, 2), length and flags of each extent from `offset` on.
    :param depth: the same; the flags are the NBD depth.
    :raise NBDProtocolError: an empty context, an extent without length, or a depth past
        the chain.
    """
    base_stops = _stops("base:allocation", base, length) + offset
    depth_stops = _stops("qemu:allocation-depth", depth, length) + offset
    stop = min(int(base_stops[-1]), int(depth_stops[-1]))
    # A handful of numbers; np.unique would import numpy.ma, which a command pays for.
    inside = nodes.sizes[(nodes.sizes > offset) & (nodes.sizes < stop)]
    ends = np.array(sorted(set(inside.tolist())), np.int64)
    stops = np.concatenate([base_stops, depth_stops, ends])
    stops.sort(kind="stable")  # sorted runs: merged in linear time
    stops = stops[: np.searchsorted(stops, stop, side="right")]
    stops = stops[np.append(stops[1:] != stops[:-1], True)]
    starts = np.concatenate([np.array([offset]), stops[:-1]])
    level = depth[np.searchsorted(depth_stops, starts, side="right"), 1]
    if level.min() < 0 or level.max() > len(nodes.sizes):
        raise NBDProtocolError(
            f"the NBD server names allocation depth {int(level.max())} between offsets "
            f"{offset} and {stop}, but the chain has {len(nodes.sizes)} nodes"
        )
    status = base[np.searchsorted(base_stops, starts, side="right"), 1]
    return Merged(starts, *_rules(starts, status, level.astype(np.int64), nodes), stop)


def _stops(name: str, extents: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
    """Return where each extent stops, up to the first that reaches `length`, cut there."""
    if not len(extents):
        raise NBDProtocolError(f"the NBD server sent no extent of {name}")
    if extents[:, 0].min() <= 0:
        raise NBDProtocolError(f"the NBD server sent an extent of {name} without length")
    # Cut first, so that a sum that overflows turns negative at once and is never plausible.
    lengths = np.minimum(extents[:, 0].astype(np.uint64), np.uint64(length))
    stops = np.cumsum(lengths.astype(np.int64))
    past = np.flatnonzero((stops >= length) | (stops < 0))
    if len(past):
        stops = stops[: past[0] + 1]
        stops[-1] = length
    return stops


def _rules(
    starts: npt.NDArray[np.int64],
    status: npt.NDArray[Any],
    level: npt.NDArray[np.int64],
    nodes: Nodes,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Apply the table above to extents that each lie wholly before or past every end."""
    absent = level == 0
    node = np.maximum(level - 1, 0)
    past = starts >= nodes.sizes[node]
    past &= ~absent
    depth = nodes.levels[node]
    depth[past] = np.maximum(depth[past] - 1, 0)
    depth[absent] = nodes.levels[-1]
    zero = (status & _STATE_ZERO) != 0
    data = (status & _STATE_HOLE) == 0
    flags = np.uint8(PRESENT) | zero * np.uint8(ZERO) | data * np.uint8(DATA)
    flags[absent | past] = ZERO
    return depth, flags
