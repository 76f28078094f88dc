"""Ranges against Python's own sets of integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.errors import RangeError
from qmpblock.ranges import Ranges

# Correct, not quick: the machine may be busy with other tests.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

UNIVERSE = 40
pairs = st.tuples(st.integers(0, UNIVERSE), st.integers(0, 9)).map(
    lambda p: (p[0], min(p[0] + p[1], UNIVERSE))
)
lists = st.lists(pairs, max_size=8)


def members(ranges: Ranges) -> set[int]:
    return {b for start, stop in ranges for b in range(start, stop)}


def bytes_of(given: list[tuple[int, int]]) -> set[int]:
    return {b for start, stop in given for b in range(start, stop)}


def check(ranges: Ranges, expected: set[int]) -> None:
    assert members(ranges) == expected
    assert np.all(np.diff(ranges.edges) > 0), "sorted, disjoint, not adjacent, none empty"
    assert ranges.total == len(expected)
    assert not ranges.edges.flags.writeable


@given(lists)
def test_construction(given: list[tuple[int, int]]) -> None:
    check(Ranges(given), bytes_of(given))
    check(Ranges.from_arrays(*zip(*given, strict=True)) if given else Ranges(), bytes_of(given))
    for byte in range(UNIVERSE + 1):
        assert (byte in Ranges(given)) == (byte in bytes_of(given))


@given(lists, lists)
def test_algebra(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b, x, y = Ranges(one), Ranges(other), bytes_of(one), bytes_of(other)
    check(a | b, x | y)
    check(a & b, x & y)
    check(a - b, x - y)
    assert (a == b) == (x == y)


@given(lists, pairs)
def test_within_a_range(given: list[tuple[int, int]], window: tuple[int, int]) -> None:
    start, stop = window
    inside = set(range(start, stop))
    check(Ranges(given).clip(start, stop - start), bytes_of(given) & inside)
    check(Ranges(given).complement(start, stop - start), inside - bytes_of(given))


@given(lists, st.integers(-2, 2 * UNIVERSE))
def test_the_lowest_bytes(given: list[tuple[int, int]], amount: int) -> None:
    check(Ranges(given).lowest(amount), set(sorted(bytes_of(given))[: max(0, amount)]))


@given(lists, st.integers(1, 12), st.integers(0, 8))
def test_alignment(given: list[tuple[int, int]], cluster: int, more: int) -> None:
    held, size = bytes_of(given), UNIVERSE + more
    clusters = [set(range(at, at + cluster)) for at in range(0, size + cluster, cluster)]
    disk = set(range(size))
    touched = {b for c in clusters if c & held for b in c}
    check(Ranges(given).align_out(cluster), touched)
    check(Ranges(given).align_out(cluster, size), touched & disk)
    check(Ranges(given).align_in(cluster), {b for c in clusters if c <= held for b in c})
    whole = {b for c in clusters if c & disk and c & disk <= held for b in c & disk}
    check(Ranges(given).align_in(cluster, size), whole)


@given(lists, st.integers(1, 12))
def test_split(given: list[tuple[int, int]], limit: int) -> None:
    pieces = list(Ranges(given).split(limit))
    assert all(0 < stop - start <= limit for start, stop in pieces)
    assert [b for start, stop in pieces for b in range(start, stop)] == sorted(bytes_of(given))
    for start, stop in pieces:
        assert start // limit == (stop - 1) // limit, "cuts lie at multiples of the limit"


@given(lists, st.integers(0, 6), st.integers(0, 6))
def test_slices(given: list[tuple[int, int]], first: int, last: int) -> None:
    assert list(Ranges(given)[first:last]) == list(Ranges(given))[first:last]


def test_what_is_no_range_is_refused() -> None:
    for wrong in [(-1, 4)], [(5, 4)]:
        with pytest.raises(RangeError, match="negative, or stops before"):
            Ranges(wrong)
    with pytest.raises(RangeError, match="as many starts as stops"):
        Ranges.from_arrays([1, 2], [3])
    with pytest.raises(RangeError, match="0 bytes"):
        Ranges([(1, 2)]).align_in(0)
    with pytest.raises(RangeError, match="-1 bytes"):
        list(Ranges([(1, 2)]).split(-1))
    with pytest.raises(RangeError, match="step 1"):
        Ranges([(1, 2)])[::2]


def test_repr_stays_short() -> None:
    assert repr(Ranges([(0, 4), (8, 9)])) == "<Ranges of 5 bytes in 2: [0, 4), [8, 9)>"
    assert len(repr(Ranges((i * 10, i * 10 + 5) for i in range(100_000)))) < 100
