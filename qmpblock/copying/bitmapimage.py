"""A qcow2 image that holds nothing but a dirty bitmap: of ranges that are to be copied.

Its clusters, of 64 KiB::

    0        header, and its extension: where the directory is
    1        table of reference counts: empty. QEMU only reads the image, and counts nothing
    2        where each cluster of the disk is: nowhere, as far as the disk goes
             directory of bitmaps: one
             table of the bitmap: where each cluster of its bits is; 0: all are clear, 1: all set
             clusters of bits

(qcow2.rst of QEMU, "Bitmaps".) What is empty is a hole, so that it costs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from qmpblock.host.contents import Contents
from qmpblock.ranges import Ranges

__all__ = ["bitmap_image"]

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS  # bytes
_BITS = 8 * _CLUSTER  # that a cluster holds
_MOST = 1 << 32  # bits: QEMU loads no bitmap of more than 512 MiB
_LONGEST = 32 << 20  # bytes of the table of where the disk's clusters are, likewise
_SECTOR = 512  # bytes: of as many whole ones is QEMU's disk

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">IIIIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_BITMAPS = 0x23852875  # the extension's type
_SET = 1  # an entry of the table: all bits are set


def bitmap_image(name: str, size: int, ranges: Ranges, grain: int) -> Contents | None:
    """Return a qcow2 image with a bitmap that has the bits of ranges set; None: QEMU takes none.

    :param size: of the disk, in bytes.
    :param grain: bytes that one bit stands for: a power of two.
    """
    size += -size % _SECTOR
    bits = -(-size // grain)
    mapping = -(-size // (_CLUSTER * _CLUSTER // 8))  # entries, each of a table of clusters
    if bits > _MOST or 8 * mapping > _LONGEST:
        return None
    directory = 2 + _clusters(8 * mapping)
    table = directory + 1
    first = table + _clusters(8 * -(-bits // _BITS))
    entries = np.zeros(-(-bits // _BITS), ">u8")
    pieces: list[tuple[int, bytes]] = []
    for number, data in _marked(ranges, grain):
        if data is None:
            entries[number] = _SET
        else:
            entries[number] = (first + len(pieces)) * _CLUSTER
            pieces.append(((first + len(pieces)) * _CLUSTER, data))
    called = name.encode()
    entry = _ENTRY.pack(
        *(table * _CLUSTER, len(entries), 0),
        *(1, grain.bit_length() - 1, len(called), 0),  # 1: it is of what is dirty
    )
    entry += called + bytes(-(len(entry) + len(called)) % 8)
    header = _HEADER.pack(
        *(b"QFI\xfb", 3, 0, 0),  # no backing image
        *(_CLUSTER_BITS, size, 0),  # not encrypted
        *(mapping, 2 * _CLUSTER),
        *(_CLUSTER, 1),
        *(0, 0),  # no snapshots
        *(0, 0, 1),  # features; bit 0 of those that vouch for bitmaps
        *(4, _HEADER.size),  # reference counts of 16 bits
    )
    header += _EXTENSION.pack(
        *(_BITMAPS, _EXTENSION.size - 8, 1, 0), len(entry), directory * _CLUSTER
    )
    return Contents(
        (first + len(pieces)) * _CLUSTER,
        (
            (0, header + bytes(8)),  # after which no extension comes
            (directory * _CLUSTER, entry),
            (table * _CLUSTER, entries.tobytes()),
            *pieces,
        ),
    )


def _clusters(length: int) -> int:
    return -(-length // _CLUSTER)


def _marked(ranges: Ranges, grain: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield each cluster of bits some of which are set, by its number; None: all are."""
    marked = Ranges.from_arrays(ranges.starts // grain, -(-ranges.stops // grain))
    for number in _touched(marked):
        at = number * _BITS
        begin = int(np.searchsorted(marked.stops, at, side="right"))
        past = int(np.searchsorted(marked.starts, at + _BITS, side="left"))
        part = marked[begin:past].clip(at, _BITS)
        if part.total == _BITS:
            yield number, None
            continue
        steps = np.zeros(_BITS + 1, np.int8)
        steps[part.starts - at] = 1
        steps[part.stops - at] = -1
        yield number, np.packbits(np.cumsum(steps[:-1], dtype=np.int8), bitorder="little").tobytes()


def _touched(marked: Ranges) -> Iterator[int]:
    """Yield the numbers of the clusters in which any bit is."""
    for start, stop in marked.align_out(_BITS):
        yield from range(start // _BITS, stop // _BITS)
