"""AllocationMap: which layer supplies every byte of a disk, as columns of extents.

A map covers one range of bytes without gaps. Extent i runs from `offsets[i]` to
`offsets[i + 1]` (the last one to `stop`), so there is no length to contradict it: 13
bytes an extent, and every operation is a few passes over three arrays.

The records mean what `qemu-img map --output=json` means by them:

- depth: 0 is the active layer, 1 its backing, ...;
- present: that layer holds the range; zero: it reads as zeros; data: data is stored;
- not present: no layer holds it. Depth then names the layer whose end of the chain, or
  whose too short backing, makes it read as zeros.

To which QEMU's JSON cannot add: reserved, where host space is held although the range
reads as zeros (a preallocated zero cluster, a fallocated but unwritten raw range).

Pure: NumPy only. Offsets, lengths and sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from qmpblock.errors import RangeError, RequestError
from qmpblock.extents.records import (
    DATA,
    PRESENT,
    RESERVED,
    ZERO,
    Columns,
    parse_records,
    record,
    text,
)
from qmpblock.ranges import Ranges

__all__ = [
    "DATA",
    "PRESENT",
    "RESERVED",
    "ZERO",
    "AllocationMap",
    "Extent",
    "LayerTotals",
    "Ranges",
    "Totals",
    "layer_extents_json",
]


_QEMU_IMG = PRESENT | ZERO | DATA  # what qemu-img's JSON can say
_CHUNK = 1 << 14  # extents turned into Python objects at a time

_Offsets = npt.NDArray[np.int64]
_Depths = npt.NDArray[np.int32]
_Flags = npt.NDArray[np.uint8]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Extent:
    """One record of a map; see the module's text for what its fields mean."""

    offset: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    reserved: bool = False


@dataclass(frozen=True, slots=True)
class LayerTotals:
    """How many bytes of the range one layer supplies.

    :ivar data: held, and not known to read as zeros.
    :ivar zero: held, and reading as zeros.
    :ivar reserved: of the zero bytes, those known to hold host space.
    """

    depth: int
    data: int
    zero: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes by layer; `data` and `zero` of all layers and `absent` add up to `length`.

    :ivar layers: one entry for every layer, depth 0 first.
    :ivar absent: held by no layer.
    """

    offset: int
    length: int
    layers: tuple[LayerTotals, ...]
    absent: int

    def as_json(self, *, size: int) -> dict[str, Any]:
        """Return the document of docs/schema/map-totals.schema.json.

        :param size: the whole disk's size.
        """
        return {
            "size": size,
            "offset": self.offset,
            "length": self.length,
            "totals": [
                {"depth": t.depth, "data": t.data, "zero": t.zero, "reserved": t.reserved}
                for t in self.layers
            ],
            "absent": self.absent,
        }


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AllocationMap:
    """An immutable map of [start, stop).

    :ivar offsets: int64, where each extent starts; the first is `start`.
    :ivar depth: int32, qemu-img's numbering, below `layers`.
    :ivar flags: uint8, bits PRESENT, ZERO, DATA, RESERVED.
    :ivar layers: how many layers the chain has.

    The arrays are taken over, not copied, and made read-only. Equality is by content:
    the range and the records after `coalesce`, whatever `layers` is.

    :raise RequestError: the columns are no map (see the message).
    """

    start: int
    stop: int
    offsets: _Offsets
    depth: _Depths
    flags: _Flags
    layers: int = 1
    __hash__ = None  # type: ignore[assignment]  # equality is by content of arrays

    def __post_init__(self) -> None:
        columns = (("offsets", np.int64), ("depth", np.int32), ("flags", np.uint8))
        for name, dtype in columns:
            column = np.asarray(getattr(self, name), dtype=dtype).view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        complaint = self._complaint()
        if complaint:
            raise RequestError(f"not an allocation map: {complaint}")

    def _complaint(self) -> str | None:
        """Say what breaks the rules that every operation relies on, or None."""
        offsets, depth, flags = self.offsets, self.depth, self.flags
        if not 0 <= self.start <= self.stop:
            return f"it runs from {self.start} to {self.stop}"
        if not offsets.shape == depth.shape == flags.shape == (offsets.size,):
            return "its columns differ in length"
        if (self.start == self.stop) != (len(offsets) == 0):
            return f"{len(offsets)} extents over {self.stop - self.start} bytes"
        if self.layers < 1:
            return f"{self.layers} layers"
        if not len(offsets):
            return None
        if offsets[0] != self.start or offsets[-1] >= self.stop:
            return "its extents do not cover its range"
        if np.any(offsets[1:] <= offsets[:-1]):
            return "its offsets do not ascend"
        if depth.min() < 0 or depth.max() >= self.layers:
            return f"a depth outside the {self.layers} layers"
        return None

    @classmethod
    def uniform(
        cls, offset: int, length: int, *, depth: int = 0, flags: int = 0, layers: int = 1
    ) -> AllocationMap:
        """Return a map of one extent (none where `length` is 0)."""
        count = 1 if length else 0
        return cls(
            offset,
            offset + length,
            np.full(count, offset, np.int64),
            np.full(count, depth, np.int32),
            np.full(count, flags, np.uint8),
            layers,
        )

    # Reading

    @property
    def length(self) -> int:
        """How many bytes the map covers."""
        return self.stop - self.start

    @property
    def stops(self) -> _Offsets:
        """Where each extent ends (computed)."""
        return np.append(self.offsets[1:], np.int64(self.stop)) if len(self) else self.offsets

    @property
    def lengths(self) -> _Offsets:
        """The length of each extent (computed)."""
        return self.stops - self.offsets

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the columns take."""
        return self.offsets.nbytes + self.depth.nbytes + self.flags.nbytes

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        return (
            f"<AllocationMap [{self.start}, {self.stop}): {len(self)} extents, "
            f"{self.layers} layer{'s' if self.layers != 1 else ''}>"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AllocationMap):
            return NotImplemented
        if (self.start, self.stop) != (other.start, other.stop):
            return False
        mine, theirs = self.coalesce(), other.coalesce()
        return (
            np.array_equal(mine.offsets, theirs.offsets)
            and np.array_equal(mine.depth, theirs.depth)
            and np.array_equal(mine.flags, theirs.flags)
        )

    def __iter__(self) -> Iterator[Extent]:
        for columns in self._chunks():
            yield from map(_extent, *(column.tolist() for column in columns))

    def at(self, offset: int) -> Extent:
        """Return the extent that holds the byte at `offset`.

        :raise RangeError: the map does not cover it.
        """
        if not self.start <= offset < self.stop:
            raise RangeError(f"offset {offset} is outside the map, {self.start} to {self.stop}")
        i = int(np.searchsorted(self.offsets, offset, side="right")) - 1
        return _extent(*(column.item() for column in self._columns(i, i + 1)))

    def _chunks(self) -> Iterator[Columns]:
        """Yield the columns, so many extents at a time that they stay in the CPU's cache."""
        for first in range(0, len(self), _CHUNK):
            yield self._columns(first, first + _CHUNK)

    def _columns(self, first: int, last: int) -> Columns:
        bounds = self.offsets[first : last + 1]
        if last >= len(self):
            bounds = np.append(bounds, np.int64(self.stop))
        here = slice(first, last)
        return Columns(bounds[:-1], np.diff(bounds), self.depth[here], self.flags[here])

    # Maps from maps

    def clip(self, offset: int, length: int) -> AllocationMap:
        """Return the part [offset, offset + length), cut at any byte.

        :raise RangeError: it is not inside this map.
        """
        stop = offset + length
        if length < 0 or not self.start <= offset <= stop <= self.stop:
            raise RangeError(
                f"offset {offset}, length {length} is outside the map, {self.start} to {self.stop}"
            )
        if not length:
            return AllocationMap.uniform(offset, 0, layers=self.layers)
        first = int(np.searchsorted(self.offsets, offset, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        offsets = self.offsets[first:last]
        if offsets[0] != offset:
            offsets = offsets.copy()
            offsets[0] = offset
        return self._with(
            start=offset,
            stop=stop,
            offsets=offsets,
            depth=self.depth[first:last],
            flags=self.flags[first:last],
        )

    def coalesce(self) -> AllocationMap:
        """Return the canonical form: adjacent extents of equal records merged."""
        return self._merged(self.flags)

    def _merged(self, flags: _Flags) -> AllocationMap:
        keep = np.ones(len(self), np.bool_)
        np.not_equal(self.depth[1:], self.depth[:-1], out=keep[1:])
        keep[1:] |= flags[1:] != flags[:-1]
        if keep.all():
            return self if flags is self.flags else self._with(flags=flags)
        return self._with(offsets=self.offsets[keep], depth=self.depth[keep], flags=flags[keep])

    def with_reserved(self, ranges: Ranges) -> AllocationMap:
        """Return this map with its present zero extents inside `ranges` marked reserved."""
        cut = self.cut(ranges.edges)
        inside = (np.searchsorted(ranges.edges, cut.offsets, side="right") & 1).astype(np.bool_)
        marked = inside & cut._mask(PRESENT | ZERO)
        return cut._merged(cut.flags | (marked * np.uint8(RESERVED)))

    def without_reserved(self) -> AllocationMap:
        """Return what qemu-img's JSON can say of this map, in canonical form."""
        return self._merged(self.flags & np.uint8(_QEMU_IMG))

    def cut(self, points: npt.ArrayLike) -> AllocationMap:
        """Return the same map with an extent starting at each of `points` inside it."""
        wanted = _ascending(np.asarray(points, np.int64))
        wanted = wanted[(wanted > self.start) & (wanted < self.stop)]
        at = np.searchsorted(self.offsets, wanted)
        fresh = np.append(self.offsets, np.int64(self.stop))[at] != wanted
        at, wanted = at[fresh], wanted[fresh]
        if not len(wanted):
            return self
        return self._with(
            offsets=np.insert(self.offsets, at, wanted),
            depth=np.insert(self.depth, at, self.depth[at - 1]),
            flags=np.insert(self.flags, at, self.flags[at - 1]),
        )

    def own(self, depth: int = 0) -> AllocationMap:
        """Return what the layer at `depth` supplies, as a map of that layer alone.

        What it does not supply is absent (no flags), so for depth 0, of a map taken with
        that layer as the active one, the result is the layer's own content.
        """
        mine = self._mask(PRESENT) & (self.depth == depth)
        flags = np.where(mine, self.flags, np.uint8(0))
        return self._with(depth=np.zeros_like(self.depth), flags=flags, layers=1).coalesce()

    @classmethod
    def concat(cls, parts: Iterable[AllocationMap]) -> AllocationMap:
        """Return one map of adjacent ranges, given in order.

        :raise RequestError: there is none, or one does not start where the last stopped.
        """
        maps = list(parts)
        if not maps:
            raise RequestError("there is no map to concatenate")
        for left, right in pairwise(maps):
            if left.stop != right.start:
                raise RequestError(
                    f"maps must follow each other: one stops at {left.stop}, "
                    f"the next starts at {right.start}"
                )
        return cls(
            maps[0].start,
            maps[-1].stop,
            np.concatenate([m.offsets for m in maps]),
            np.concatenate([m.depth for m in maps]),
            np.concatenate([m.flags for m in maps]),
            max(m.layers for m in maps),
        ).coalesce()

    @classmethod
    def stack(cls, layer_maps: Sequence[AllocationMap]) -> AllocationMap:
        """Compose what the guest sees from what each layer itself holds.

        :param layer_maps: of each layer alone (`own`), the active one first; all start
            at the same offset, and each stops where its layer does.
        :raise RequestError: there is none, or they start at different offsets.
        """
        if not layer_maps or len({m.start for m in layer_maps}) != 1:
            raise RequestError("layers to stack must all start at the same offset")
        top, count = layer_maps[0], len(layer_maps)
        if not top.length:
            return cls.uniform(top.start, 0, layers=count)
        ends = np.array([top.start, *(m.stop for m in layer_maps)], np.int64)
        edges = _ascending(np.concatenate([*(m.offsets for m in layer_maps), ends]))
        edges = edges[edges < top.stop]
        depth = np.full(len(edges), count - 1, np.int32)
        flags = np.full(len(edges), ZERO, np.uint8)
        for level in range(count - 1, -1, -1):  # from the base up: the upper one decides
            layer = layer_maps[level]
            inside = int(np.searchsorted(edges, layer.stop))
            if level:  # what lies past a short layer's end reads as zeros, through its overlay
                depth[inside:], flags[inside:] = level - 1, ZERO
            if not inside:
                continue
            source = np.searchsorted(layer.offsets, edges[:inside], side="right") - 1
            own = layer.flags[source]
            held = np.flatnonzero(own & PRESENT)
            depth[held], flags[held] = level, own[held]
        return cls(top.start, top.stop, edges, depth, flags, count).coalesce()

    def _with(self, **changes: Any) -> AllocationMap:
        fields = ("start", "stop", "offsets", "depth", "flags", "layers")
        return AllocationMap(**({name: getattr(self, name) for name in fields} | changes))

    # Sets and sums

    def _mask(self, bits: int) -> _Mask:
        """Tell which extents have all of these flags."""
        mask: _Mask = (self.flags & np.uint8(bits)) == bits
        return mask

    def where(
        self,
        mask: npt.ArrayLike | None = None,
        *,
        depth: int | None = None,
        present: bool | None = None,
        zero: bool | None = None,
        data: bool | None = None,
        reserved: bool | None = None,
    ) -> Ranges:
        """Return the bytes of the extents that fit every condition given.

        :param mask: a boolean for each extent.
        :raise RequestError: the mask has another length than the map.
        """
        fit = np.ones(len(self), np.bool_) if mask is None else np.asarray(mask, np.bool_)
        if fit.shape != self.offsets.shape:
            raise RequestError(f"a mask of shape {fit.shape} for {len(self)} extents")
        wanted = ((PRESENT, present), (ZERO, zero), (DATA, data), (RESERVED, reserved))
        for bit, value in wanted:
            if value is not None:
                fit = fit & (self._mask(bit) == value)
        if depth is not None:
            fit = fit & (self.depth == depth)
        return Ranges.from_arrays(self.offsets[fit], self.stops[fit])

    def data(self) -> Ranges:
        """Return what some layer holds and is not known to read as zeros."""
        return self.where(present=True, zero=False)

    def zeros(self) -> Ranges:
        """Return what some layer holds and reads as zeros."""
        return self.where(present=True, zero=True)

    def holes(self) -> Ranges:
        """Return what no layer holds; with `data` and `zeros` it makes up the range."""
        return self.where(present=False)

    def not_in_active(self) -> Ranges:
        """Return what some layer below the active one supplies."""
        return self.where(self.depth > 0, present=True)

    def totals(self) -> Totals:
        """Add up the bytes by layer."""
        lengths = self.lengths
        held, zero = self._mask(PRESENT), self._mask(ZERO)

        def by_layer(chosen: _Mask) -> list[int]:
            # Integer sums: bincount's weights are doubles, inexact past 2**53.
            sums = np.zeros(self.layers, np.int64)
            np.add.at(sums, self.depth[chosen], lengths[chosen])
            return [int(s) for s in sums]

        columns = zip(
            by_layer(held & ~zero),
            by_layer(held & zero),
            by_layer(held & zero & self._mask(RESERVED)),
            strict=True,
        )
        return Totals(
            self.start,
            self.length,
            tuple(LayerTotals(depth, *sums) for depth, sums in enumerate(columns)),
            int(lengths[~held].sum()),
        )

    # qemu-img's JSON

    @classmethod
    def from_qemu_img(
        cls,
        records: Sequence[Mapping[str, Any]],
        *,
        layers: int | None = None,
        formats: Sequence[str] | None = None,
    ) -> AllocationMap:
        """Read the parsed output of `qemu-img map --output=json`.

        :param layers: how many layers the chain has; by default as many as are named.
        :param formats: of each layer, depth 0 first; they tell preallocated zero clusters
            (see `maprecords.parse_records`).
        :raise UnsupportedError: QEMU older than 6.1, whose records do not say `present`.
        :raise RequestError: the records are not what qemu-img prints.
        """
        columns = parse_records(records, formats)
        start = int(records[0]["start"]) if records else 0
        count = int(columns.depth.max(initial=0)) + 1 if layers is None else layers
        stop = start + int(columns.lengths.sum())
        return cls(start, stop, columns.offsets, columns.depth, columns.flags, count).coalesce()

    def to_qemu_img(self) -> list[dict[str, Any]]:
        """Return the records that `qemu-img map --output=json` prints, without `offset`."""
        return [
            record(*row)
            for columns in self._plain_chunks()
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def to_qemu_img_json(self) -> Iterator[str]:
        """Yield the text of `to_qemu_img` in pieces: together one document, a record a line."""
        return text(self._plain_chunks())

    def _plain_chunks(self) -> Iterator[Columns]:
        if not len(self):  # qemu-img describes an empty image by one empty record
            start, nothing = np.array([self.start]), np.zeros(1, np.int64)
            return iter(
                [Columns(start, nothing, nothing.astype(np.int32), nothing.astype(np.uint8))]
            )
        return self.without_reserved()._chunks()


def layer_extents_json(own: AllocationMap) -> list[dict[str, Any]]:
    """Return a layer's own extents as docs/schema/layers.schema.json has them."""
    return [
        {
            "start": extent.offset,
            "length": extent.length,
            "present": extent.present,
            "zero": extent.zero,
            "data": extent.data,
            "reserved": extent.reserved,
        }
        for extent in own.coalesce()
    ]


def _ascending(points: _Offsets) -> _Offsets:
    """Sort, each once; np.unique hashes, ten times slower on runs that are sorted already."""
    points = np.sort(points, kind="stable")
    return points[np.append(points[1:] != points[:-1], True)] if len(points) else points


def _extent(offset: int, length: int, depth: int, flags: int) -> Extent:
    return Extent(
        offset,
        length,
        depth,
        bool(flags & PRESENT),
        bool(flags & ZERO),
        bool(flags & DATA),
        bool(flags & RESERVED),
    )
