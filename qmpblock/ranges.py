"""Sets of byte ranges, and their algebra.

A set is one int64 array of edges: start, stop, start, stop, ... strictly increasing, so
its ranges are sorted, disjoint and never adjacent. Byte b is in the set when an odd
number of edges are at or below b, and every operation is that test at the edges of both
sets: linear in the ranges after a merge, no Python loop over them.

Pure: NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qmpblock.errors import RangeError

__all__ = ["Ranges"]

_Edges = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]
_CHUNK = 1 << 16  # ranges turned into Python integers at a time


class Ranges:
    """An immutable set of bytes, held as sorted disjoint ranges [start, stop)."""

    __slots__ = ("_edges",)
    __hash__ = None  # type: ignore[assignment]  # equality is by content of arrays

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Build the set from (start, stop) pairs: in any order, overlapping or empty.

        :raise RangeError: a range is negative or stops before it starts.
        """
        pairs = np.array([*ranges], dtype=np.int64).reshape(-1, 2)
        self._edges = _canonical(pairs[:, 0], pairs[:, 1])
        self._edges.flags.writeable = False

    @classmethod
    def from_arrays(cls, starts: npt.ArrayLike, stops: npt.ArrayLike) -> Ranges:
        """Build the set from two arrays of the same length, as the constructor does."""
        return cls._of(_canonical(np.asarray(starts, np.int64), np.asarray(stops, np.int64)))

    @classmethod
    def _of(cls, edges: _Edges) -> Ranges:
        """Wrap edges that are known to be canonical; takes them over."""
        made = cls.__new__(cls)
        made._edges = edges
        made._edges.flags.writeable = False
        return made

    @property
    def edges(self) -> _Edges:
        """Return start, stop, start, stop, ...: strictly ascending, read-only."""
        return self._edges

    @property
    def starts(self) -> _Edges:
        """Where each range starts, ascending."""
        return self._edges[0::2]

    @property
    def stops(self) -> _Edges:
        """Where each range stops (its first byte past the end)."""
        return self._edges[1::2]

    @property
    def total(self) -> int:
        """How many bytes the set holds."""
        return int((self.stops - self.starts).sum())

    def __len__(self) -> int:
        return len(self._edges) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop), ascending."""
        for at in range(0, len(self._edges), 2 * _CHUNK):
            edges = self._edges[at : at + 2 * _CHUNK].tolist()
            yield from zip(edges[0::2], edges[1::2], strict=True)

    def __contains__(self, offset: int) -> bool:
        return bool(np.searchsorted(self._edges, offset, side="right") & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranges):
            return NotImplemented
        return np.array_equal(self._edges, other._edges)

    def __repr__(self) -> str:
        shown = ", ".join(f"[{a}, {b})" for a, b in self[:4])
        more = ", ..." if len(self) > 4 else ""
        return f"<Ranges of {self.total} bytes in {len(self)}: {shown}{more}>"

    def __getitem__(self, which: slice) -> Ranges:
        """Return the set of a slice of the ranges (step 1)."""
        first, last, step = which.indices(len(self))
        if step != 1:
            raise RangeError("a set of ranges can only be sliced with step 1")
        return Ranges._of(self._edges[2 * first : 2 * max(first, last)].copy())

    def union(self, other: Ranges) -> Ranges:
        """Return the bytes in either set."""
        if not self or not other:
            return self or other
        return self._combine(other, np.logical_or)

    def intersection(self, other: Ranges) -> Ranges:
        """Return the bytes in both sets."""
        if not self or not other:
            return Ranges()
        return self._combine(other, np.logical_and)

    def difference(self, other: Ranges) -> Ranges:
        """Return the bytes in this set that are not in the other."""
        if not self or not other:
            return self
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    __or__ = union
    __and__ = intersection
    __sub__ = difference

    def clip(self, offset: int, length: int) -> Ranges:
        """Return the bytes in [offset, offset + length)."""
        return self & Ranges([(offset, offset + length)])

    def lowest(self, amount: int) -> Ranges:
        """Return the lowest `amount` bytes of the set; all of it where it has fewer."""
        lengths = self.stops - self.starts
        before = np.cumsum(lengths) - lengths  # bytes of the set below each range
        kept = before < amount
        starts, lengths, before = self.starts[kept], lengths[kept], before[kept]
        return Ranges.from_arrays(starts, starts + np.minimum(lengths, amount - before))

    def complement(self, offset: int, length: int) -> Ranges:
        """Return the bytes of [offset, offset + length) that are not in the set."""
        return Ranges([(offset, offset + length)]) - self

    def align_out(self, cluster: int, stop: int | None = None) -> Ranges:
        """Return every cluster that holds a byte of the set, whole.

        :param stop: the disk's size; a last cluster that it cuts stays cut.
        """
        starts = self.starts // _unit(cluster) * cluster
        stops = -(-self.stops // cluster) * cluster
        if stop is not None:
            stops = np.maximum(np.minimum(stops, stop), self.stops)
        return Ranges.from_arrays(starts, stops)

    def align_in(self, cluster: int, stop: int | None = None) -> Ranges:
        """Return the clusters that are whole in the set.

        :param stop: the disk's size; a last cluster that it cuts counts as whole.
        """
        starts = -(-self.starts // _unit(cluster)) * cluster
        stops = self.stops // cluster * cluster
        if stop is not None:
            stops = np.where(self.stops == stop, stop, stops)
        whole = starts < stops
        return Ranges.from_arrays(starts[whole], stops[whole])

    def split(self, limit: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) in order, each range cut into pieces of at most `limit` bytes.

        Cuts lie at whole multiples of `limit` on the disk, not from each range's start, so
        that a limit that is a multiple of the cluster never cuts a cluster.
        """
        _unit(limit)
        for start, stop in self:
            at = start
            while at < stop:
                cut = min((at // limit + 1) * limit, stop)
                yield at, cut
                at = cut

    def _combine(self, other: Ranges, rule: Callable[[_Mask, _Mask], Any]) -> Ranges:
        points = np.concatenate([self._edges, other._edges])
        points.sort(kind="stable")  # two sorted runs: one merge
        inside = rule(self._holds(points), other._holds(points))
        # An edge of the result is a point where membership changes; of equal points the
        # last one decides, and all of them see the same membership.
        before = np.concatenate([[False], inside[:-1]])
        return Ranges._of(points[inside != before])

    def _holds(self, points: _Edges) -> _Mask:
        index = np.searchsorted(self._edges, points, side="right")
        return (index & 1).astype(np.bool_)


def _unit(size: int) -> int:
    if size <= 0:
        raise RangeError(f"a cluster or piece of {size} bytes: it must be at least 1")
    return size


def _canonical(starts: _Edges, stops: _Edges) -> _Edges:
    """Sort ranges, drop empty ones, merge those that overlap or touch."""
    if starts.shape != stops.shape or starts.ndim != 1:
        raise RangeError("as many starts as stops are needed, in flat arrays")
    if np.any(starts < 0) or np.any(stops < starts):
        raise RangeError("a range is negative, or stops before it starts")
    full = starts < stops
    if not full.all():
        starts, stops = starts[full], stops[full]
    if len(starts) < 2:  # the map of a small range: NumPy takes longer for each step than for all
        return np.array([*starts, *stops], np.int64)
    if np.any(starts[1:] < starts[:-1]):
        order = np.argsort(starts, kind="stable")
        starts, stops = starts[order], stops[order]
    reach = np.maximum.accumulate(stops)
    apart = starts[1:] > reach[:-1]
    edges = np.empty(2 * (int(apart.sum()) + bool(len(starts))), np.int64)
    edges[0::2] = starts[np.concatenate([np.ones(min(1, len(starts)), np.bool_), apart])]
    edges[1::2] = reach[np.concatenate([apart, np.ones(min(1, len(starts)), np.bool_)])]
    return edges
