"""qemu-img's records: what is checked on the way in, and the text on the way out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.errors import RequestError, UnsupportedError
from qmpblock.extents.records import PRESENT, RESERVED, ZERO, Columns, parse_records, record, text

# Correct, not quick: the machine may be busy with other tests.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def rec(start: int = 0, length: int = 8, **changes: Any) -> dict[str, Any]:
    return {
        "start": start,
        "length": length,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": True,
    } | changes


def test_the_order_and_types_of_a_record() -> None:
    assert json.dumps(record(1, 2, 3, PRESENT | ZERO)) == (
        '{"start": 1, "length": 2, "depth": 3, "present": true, "zero": true, "data": false}'
    )


def test_keys_that_qemu_adds_are_accepted() -> None:
    found = parse_records([rec(offset=327680, filename="a", compressed=True)])
    assert found.lengths.tolist() == [8]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"start": 0}, "not a list"),
        ([1], "not a list"),
        ([rec(start=1.5)], "the start 1.5"),
        ([rec(start=True)], "the start True"),
        ([rec(length="8")], "the length '8'"),
        ([rec(zero=1)], "the zero 1"),
        ([rec(start=-1)], "the start -1, outside"),
        ([rec(start=2**63)], "the start 9223372036854775808, outside"),
        ([rec(start=2**63 - 2, length=4)], "record 0 .* length 4"),
        ([rec(depth=-1)], "the depth -1, outside"),
        ([rec(depth=2**31)], "the depth 2147483648, outside"),
        ([rec(), rec(8, 0)], "record 1 .* length 0"),
        ([rec(), rec(9)], "record 0 stops at 8, the next starts at 9"),
        ([rec(8), rec(0)], "not contiguous"),
        ([{k: v for k, v in rec().items() if k != "zero"}], "no 'zero'"),
    ],
)
def test_what_is_no_map_is_refused(records: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_records(records)


def test_records_of_an_old_qemu_are_named_as_such() -> None:
    old = rec()
    del old["present"]
    with pytest.raises(UnsupportedError, match=r"before 6\.1"):
        parse_records([rec(), old])


@pytest.mark.parametrize(
    ("formats", "reserved"),
    [
        (None, [True, False, False, False]),  # the third could be a raw hole: its own offset
        (["qcow2"], [True, False, True, False]),
        (["raw"], [False, False, False, False]),
        ([], [False, False, False, False]),
    ],
)
def test_a_zero_with_a_host_offset_is_preallocated(
    formats: list[str] | None, reserved: list[bool]
) -> None:
    zero = {"zero": True, "data": False}
    records = [
        rec(0, offset=327680, **zero),
        rec(8, **zero),
        rec(16, offset=16, **zero),
        rec(24, zero=True, offset=65536),  # preallocation=metadata: QEMU calls it data
    ]
    flags = parse_records(records, formats).flags
    assert [bool(f & RESERVED) for f in flags] == reserved


@given(
    st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 300), st.integers(0, 7))),
    st.integers(1, 4),
)
def test_the_text_is_json_of_the_records(rows: list[tuple[int, int, int]], size: int) -> None:
    lengths = np.array([r[0] for r in rows], np.int64)
    offsets = np.cumsum(lengths) - lengths
    depth = np.array([r[1] for r in rows], np.int32)
    flags = np.array([r[2] for r in rows], np.uint8)
    whole = Columns(offsets, lengths, depth, flags)
    chunks = [
        Columns(*(column[at : at + size] for column in whole)) for at in range(0, len(rows), size)
    ]
    assert json.loads("".join(text(chunks))) == [
        record(*row) for row in zip(*(column.tolist() for column in whole), strict=True)
    ]


def test_the_text_is_laid_out_as_qemu_img_does() -> None:
    first, second = (np.array(pair) for pair in ((0, 65536), (65536, 512)))
    columns = Columns(first, second, np.array([0, 2], np.int32), np.array([5, 2], np.uint8))
    assert "".join(text([columns])) == (
        '[{ "start": 0, "length": 65536, "depth": 0, '
        '"present": true, "zero": false, "data": true},\n'
        '{ "start": 65536, "length": 512, "depth": 2, '
        '"present": false, "zero": true, "data": false}]\n'
    )
