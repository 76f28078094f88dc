"""Strips against sums made byte by byte."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.errors import RequestError
from qmpblock.extents.allocationmap import PRESENT, RESERVED, ZERO, AllocationMap
from qmpblock.pictures import strips
from qmpblock.pictures.strips import grid, guest_strip, layer_strip, layer_strips

# Correct, not quick: the machine may be busy with other tests.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LAYERS = 3


@st.composite
def maps(draw: st.DrawFn) -> AllocationMap:
    runs = draw(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, LAYERS - 1), st.integers(0, 15)))
    )
    start = draw(st.integers(0, 9))
    lengths = np.array([r[0] for r in runs], np.int64)
    offsets = start + np.cumsum(lengths) - lengths
    depth = np.array([r[1] for r in runs], np.int32)
    flags = np.array([r[2] for r in runs], np.uint8)
    return AllocationMap(start, start + int(lengths.sum()), offsets, depth, flags, LAYERS)


def kind(found: AllocationMap, byte: int) -> tuple[int, int]:
    extent = found.at(byte)
    if not extent.present:
        return extent.depth, strips.ABSENT
    if not extent.zero:
        return extent.depth, strips.DATA
    return extent.depth, strips.RESERVED_ZERO if extent.reserved else strips.ZEROS


@given(maps(), st.integers(0, 20), st.integers(0, 40), st.integers(1, 12), st.integers(1, 3))
def test_cells_hold_what_their_bytes_hold(
    found: AllocationMap, offset: int, length: int, cells: int, piece: int
) -> None:
    edges = grid(offset, offset + length, cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "_PIECE", piece)  # as if a map had many pieces
        strip = guest_strip("x", found, edges)
    expected = np.zeros_like(strip.held)
    for cell, (start, stop) in enumerate(itertools.pairwise(edges)):
        for byte in range(max(start, found.start), min(stop, found.stop)):
            expected[(cell, *kind(found, byte))] += 1
    assert strip.held.tolist() == expected.tolist()
    for cell, depth in enumerate(strip.supplier):
        data = expected[cell, :, strips.DATA]
        zeros = expected[cell, :, strips.ZEROS] + expected[cell, :, strips.RESERVED_ZERO]
        deciding = data if data.any() else zeros
        assert depth == (deciding.argmax() if deciding.any() else -1)


@given(st.integers(0, 2**62), st.integers(0, 2**62 - 1), st.integers(1, 200))
def test_a_grid_covers_its_range_evenly(offset: int, length: int, cells: int) -> None:
    edges = grid(offset, offset + length, cells).tolist()
    widths = [b - a for a, b in itertools.pairwise(edges)]
    assert (edges[0], edges[-1]) == (offset, offset + length)
    assert len(widths) == max(1, min(cells, length))
    assert max(widths) - min(widths) <= 1


def test_the_picture_has_the_zeros_on_top_and_the_guest_below() -> None:
    base = AllocationMap.uniform(0, 8, flags=PRESENT | ZERO | RESERVED)
    top = AllocationMap.uniform(0, 16)
    guest = AllocationMap.stack([top, base])
    found = layer_strips([("base", base), ("top", top)], guest, grid(0, 16, 2))
    assert [(s.role, s.label, s.depth, s.end) for s in found] == [
        ("zeros", "implicit zeros", -1, 16),
        ("layer", "base", 1, 8),
        ("layer", "top", 0, 16),
        ("guest", "guest sees", 0, 16),
    ]
    assert found[1].supplier.tolist() == [1, -1]
    assert found[3].supplier.tolist() == [1, -1]
    assert found[0].supplier.tolist() == [-1, -1]


def test_a_chain_is_not_taken_for_a_layer() -> None:
    with pytest.raises(RequestError, match=r"a\\x1b is of a chain"):
        layer_strip("a\x1b", AllocationMap.uniform(0, 8, layers=2), 0, grid(0, 8, 2))
