"""Records of maps, as `qemu-img map --output=json` prints them, to columns and back.

Columns are NumPy arrays of one length: offset and length (int64), depth, flags. Records
may come from a program or a user, so every value is checked before it is believed.

Pure: NumPy only. Offsets and lengths are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmpblock.errors import RequestError, UnsupportedError, printable

__all__ = ["DATA", "PRESENT", "RESERVED", "ZERO", "Columns", "parse_records", "record", "text"]

#: What an extent is; the first three are keys of qemu-img's records.
PRESENT, ZERO, DATA, RESERVED = 1, 2, 4, 8

_FLAG_NAMES = (("present", PRESENT), ("zero", ZERO), ("data", DATA))
_EXPLICIT_ZEROS = frozenset({"qcow2"})  # formats where a zero cluster may hold host space
_HEAD = '{ "start": %d, "length": %d%s'


class Columns(NamedTuple):
    """Records as arrays, in their order."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]


def parse_records(
    records: Sequence[Mapping[str, Any]], formats: Sequence[str] | None = None
) -> Columns:
    """Check and gather the records of a map: sorted, contiguous, none empty.

    :param formats: of each layer, depth 0 first. A zero range with a host offset is a
        preallocated zero cluster in qcow2 and thus RESERVED; but QEMU gives holes in raw
        files an offset too, their own. Without formats, a zero range whose offset is its
        own is taken for raw.
    :raise UnsupportedError: QEMU older than 6.1, whose records do not say `present`.
    :raise RequestError: the records are not what qemu-img prints.
    """
    if not isinstance(records, Sequence) or not all(isinstance(r, Mapping) for r in records):
        raise RequestError("the map is not a list of records")
    if any("present" not in record for record in records):
        raise UnsupportedError(
            "the map does not say which ranges are present: it is from QEMU before 6.1",
            remedy="use the qemu-img of QEMU 6.1 or newer",
        )
    offsets = _integers(records, "start", np.iinfo(np.int64).max)
    lengths = _integers(records, "length", np.iinfo(np.int64).max)
    depth = _integers(records, "depth", np.iinfo(np.int32).max - 1)
    flags = np.zeros(len(records), np.uint8)
    for key, bit in _FLAG_NAMES:
        flags |= np.array(_values(records, key, bool), np.bool_) * np.uint8(bit)
    if len(records) == 1 and not lengths[0]:  # how qemu-img describes an empty image
        return Columns(offsets[:0], lengths[:0], depth[:0].astype(np.int32), flags[:0])
    stops = offsets + lengths
    wrong = np.flatnonzero((lengths == 0) | (stops < offsets))
    if len(wrong):
        i = int(wrong[0])
        raise RequestError(f"record {i} of the map has the length {lengths[i]}")
    wrong = np.flatnonzero(offsets[1:] != stops[:-1])
    if len(wrong):
        i = int(wrong[0])
        raise RequestError(
            f"the map is not contiguous: record {i} stops at {stops[i]}, "
            f"the next starts at {offsets[i + 1]}"
        )
    flags[_preallocated(records, depth, flags, formats)] |= RESERVED
    return Columns(offsets, lengths, depth.astype(np.int32), flags)


def _integers(records: Sequence[Mapping[str, Any]], key: str, most: int) -> npt.NDArray[np.int64]:
    values = _values(records, key, int)
    if values and not 0 <= min(values) <= max(values) <= most:
        odd = next(v for v in values if not 0 <= v <= most)
        raise RequestError(f"a record of the map has the {key} {odd}, outside 0 to {most}")
    return np.array(values, np.int64)


def _values(records: Sequence[Mapping[str, Any]], key: str, kind: type) -> list[Any]:
    """Gather one key of every record, of exactly this type (a bool is no number here)."""
    try:
        values = list(map(itemgetter(key), records))
    except KeyError:
        raise RequestError(f"a record of the map has no {key!r}") from None
    if not set(map(type, values)) <= {kind}:
        odd = next(v for v in values if type(v) is not kind)
        raise RequestError(f"a record of the map has the {key} {printable(repr(odd), 60)}")
    return values


def _preallocated(
    records: Sequence[Mapping[str, Any]],
    depth: npt.NDArray[np.int64],
    flags: npt.NDArray[np.uint8],
    formats: Sequence[str] | None,
) -> list[int]:
    """Find the records that are zero clusters with a host offset."""
    zeros = np.flatnonzero(flags == (PRESENT | ZERO)).tolist()
    placed = [i for i in zeros if "offset" in records[i]]
    if formats is None:
        return [i for i in placed if records[i]["offset"] != records[i]["start"]]
    explicit = [name in _EXPLICIT_ZEROS for name in formats]
    return [i for i in placed if depth[i] < len(explicit) and explicit[depth[i]]]


def record(offset: int, length: int, depth: int, flags: int) -> dict[str, Any]:
    """Return one record, with qemu-img's keys in qemu-img's order."""
    made: dict[str, Any] = {"start": offset, "length": length, "depth": depth}
    return made | {name: bool(flags & bit) for name, bit in _FLAG_NAMES}


def text(chunks: Iterable[Columns]) -> Iterator[str]:
    r"""Yield one JSON document, a record a line as qemu-img lays it out, `\n` at its end.

    One `%` over a whole chunk: 0.4 s a million records, where json.dumps takes several.
    """
    tails = _Tails()
    before = "["
    for offsets, lengths, depth, flags in chunks:
        count = len(offsets)
        cells: list[Any] = [None] * (3 * count)
        cells[0::3] = offsets.tolist()
        cells[1::3] = lengths.tolist()
        keys = depth.astype(np.int64) << 8 | flags
        cells[2::3] = map(tails.__getitem__, keys.tolist())
        yield before + ",\n".join([_HEAD] * count) % tuple(cells)
        before = ",\n"
    yield "]\n" if before != "[" else "[]\n"


class _Tails(dict[int, str]):
    """The text of a record after its length, made once for each (depth << 8 | flags)."""

    def __missing__(self, key: int) -> str:
        words = [f'"{name}": {"true" if key & bit else "false"}' for name, bit in _FLAG_NAMES]
        self[key] = f', "depth": {key >> 8}, {", ".join(words)}}}'
        return self[key]
