"""The image of a dirty bitmap: what is in it. That QEMU reads it so: live/test_drawn.py."""

import struct

import numpy as np
import pytest

from qmpblock.copying.bitmapimage import bitmap_image
from qmpblock.ranges import Ranges

KIB, GIB, TIB = 1 << 10, 1 << 30, 1 << 40
CLUSTER = GRAIN = 64 * KIB


def whole(contents):
    data = bytearray(contents.length)
    for at, piece in contents.pieces:
        data[at : at + len(piece)] = piece
    return bytes(data)


def read(data):
    """Return the bitmap's name and the ranges of its bits, by the image's own tables."""
    count, _, _, directory = struct.unpack(">IIQQ", data[112:136])
    assert (data[:4], struct.unpack(">I", data[104:108])[0], count) == (b"QFI\xfb", 0x23852875, 1)
    head = struct.unpack(">QIIBBHI", data[directory : directory + 24])
    table, entries, flags, kind, bits, length, extra = head
    assert (flags, kind, extra) == (0, 1, 0)
    found = []
    for number in range(entries):
        [entry] = struct.unpack(">Q", data[table + 8 * number : table + 8 * number + 8])
        marks = bytes(CLUSTER) if entry == 0 else b"\xff" * CLUSTER
        if entry > 1:
            marks = data[entry : entry + CLUSTER]
        places = np.flatnonzero(np.unpackbits(np.frombuffer(marks, np.uint8), bitorder="little"))
        found += [int(one) + number * 8 * CLUSTER for one in places]
    grain = 1 << bits
    name = data[directory + 24 : directory + 24 + length].decode()
    return name, Ranges([(one * grain, (one + 1) * grain) for one in found])


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, GRAIN)],
        [(5 * GIB, 5 * GIB + 3 * GRAIN), (32 * GIB - GRAIN, 32 * GIB + GRAIN)],
        [(0, 32 * GIB), (39 * GIB, 40 * GIB)],
        [(1, 2), (GRAIN, GRAIN + 1)],
    ],
)
def test_its_bits_are_those_of_the_ranges(ranges):
    image = bitmap_image("what is left", 40 * GIB, Ranges(ranges), GRAIN)
    assert read(whole(image)) == ("what is left", Ranges(ranges).align_out(GRAIN))


def test_a_large_disk_takes_next_to_nothing():
    image = bitmap_image("left", 2 * TIB, Ranges([(0, GRAIN), (TIB, 2 * TIB)]), GRAIN)
    assert sum(len(piece) for _, piece in image.pieces) < 2 * CLUSTER
    assert len(image.pieces) == 4  # of what is whole there is no cluster of bits


@pytest.mark.parametrize(("size", "grain"), [(1 << 49, GRAIN), (1 << 52, GIB)])
def test_what_qemu_would_not_load_is_not_made(size, grain):
    assert bitmap_image("left", size, Ranges([(0, GRAIN)]), grain) is None
