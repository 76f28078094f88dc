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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmpblock.errors import NBDError, NBDProtocolError, RangeError, RequestError
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.extents.records import DATA, PRESENT, ZERO

__all__ = ["ExtentAllowance", "Merged", "NBDMapBuilder", "Nodes", "merge"]

#: How many extents of a running disk are taken from a server for one map: 1.3 GB of columns, and
#: as much again for a moment where parts are put together.
MOST_EXTENTS = 100_000_000
_SMALLEST_REPLY = 64  # extents that a reply counts as at least: taking one costs that much time

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


class ExtentAllowance:
    """How many extents a server may still describe, in all parts of one map together.

    :param most: at the beginning.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = MOST_EXTENTS if most is None else most
        self._left = self._most

    def take(self, count: int, offset: int) -> None:
        """Take one reply with `count` extents from `offset` on off it.

        :raise NBDError: it is used up.
        """
        self._left -= max(count, _SMALLEST_REPLY)
        if self._left < 0:
            raise NBDError(
                f"the NBD server describes the disk in more than {self._most} extents; "
                f"it was stopped at offset {offset}",
                remedy="map a part at a time, with --offset and --length",
            )


@dataclass(slots=True)
class NBDMapBuilder:
    """Builds a map from the two contexts of an NBD export, reply by reply.

    Memory: 13 bytes an extent and an eighth more while it grows; no copy at the end. The
    allowance bounds it, and with it the time that a server can keep us busy.

    :param layer_sizes: the virtual size of each node that NBD counts, the exported one
        first (NBD depth 1). QEMU counts filters inside the chain too.
    :param offset: where the map starts.
    :param length: how much it covers; inside the first layer.
    :param levels: for each of those nodes the depth it goes by in the map, where they
        are not simply 0, 1, 2, ...: a filter goes by that of the layer under it.
    :param allowance: how many extents to take from the server at most; builders of one map
        share it.
    :raise RangeError: the range is not inside the first layer.
    """

    layer_sizes: Sequence[int]
    offset: int
    length: int
    levels: Sequence[int] | None = None
    allowance: ExtentAllowance = field(default_factory=lambda: ExtentAllowance())
    next_offset: int = field(init=False)
    _nodes: Nodes = field(init=False)
    _last: tuple[int, int] | None = field(init=False, default=None)
    _columns: tuple[bytearray, bytearray, bytearray] = field(init=False)

    def __post_init__(self) -> None:
        self._nodes = Nodes.of(self.layer_sizes, self.levels)
        stop = self.offset + self.length
        if not 0 <= self.offset <= stop <= self.layer_sizes[0]:
            raise RangeError(
                f"offset {self.offset}, length {self.length} is outside the disk "
                f"of {self.layer_sizes[0]} bytes"
            )
        self.next_offset = self.offset
        self._columns = bytearray(), bytearray(), bytearray()

    @property
    def remaining(self) -> int:
        """Bytes that no reply has described yet."""
        return self.offset + self.length - self.next_offset

    def feed(self, base: npt.NDArray[Any], depth: npt.NDArray[Any]) -> None:
        """Add one reply; `next_offset` moves on as far as both contexts reach.

        :param base: integers of shape (n, 2): length and flags of each base:allocation
            extent, the first at `next_offset`.
        :param depth: the same of qemu:allocation-depth.
        :raise NBDProtocolError: an empty context, an extent without length, a depth past
            the chain. Nothing of the reply is taken.
        :raise NBDError: the server has described more extents than the allowance.
        """
        self.allowance.take(max(len(base), len(depth)), self.next_offset)
        merged = merge(base, depth, self.next_offset, self.remaining, self._nodes)
        keep = np.empty(len(merged.starts), np.bool_)  # what differs from the extent before it
        keep[0] = self._last != (merged.depth[0], merged.flags[0])
        keep[1:] = merged.depth[1:] != merged.depth[:-1]
        keep[1:] |= merged.flags[1:] != merged.flags[:-1]
        offsets, depths, flags = self._columns
        offsets += merged.starts[keep].tobytes()
        depths += merged.depth[keep].tobytes()
        flags += merged.flags[keep].tobytes()
        self._last = int(merged.depth[-1]), int(merged.flags[-1])
        self.next_offset = merged.stop

    def finish(self) -> AllocationMap:
        """Return the map; the builder is used up.

        :raise NBDProtocolError: part of the range was not described.
        """
        if self.remaining:
            raise NBDProtocolError(
                f"the NBD server described the disk only up to {self.next_offset}, "
                f"not to {self.offset + self.length}"
            )
        offsets, depth, flags = self._columns
        return AllocationMap(
            self.offset,
            self.offset + self.length,
            np.frombuffer(offsets, np.int64),
            np.frombuffer(depth, np.int32),
            np.frombuffer(flags, np.uint8),
            self._nodes.layers,
        )
