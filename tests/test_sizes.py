"""Sizes, read and written: by one grammar, wherever they stand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.sizes import UNITS, Amount, human_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("64K", 65536), ("64k", 65536), ("1B", 1), ("1M+512", 1049088),
        ("2T", 2 << 40), ("1.5G", 3 << 29), ("1.5M", 3 << 19), ("0x10", 16), (".5K", 512),
        ("0.1K", 102), ("7E", 7 << 60), ("1.5G+0x10+1", (3 << 29) + 17), ("9" * 39, int("9" * 39)),
    ],
)  # fmt: skip
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "K", ".", "1KK", "-1", "+1", "1M+", "1e400", "nan", "inf", "½", "٣", " 1", "1 K", "1_000",
     "0x", "0x1K", "9" * 5000],
)  # fmt: skip
def test_no_size(text: str) -> None:
    assert parse_size(text) is None


@given(st.integers(0, 1 << 40), st.sampled_from(sorted(UNITS)))
def test_what_is_written_whole_is_read_back(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * UNITS[unit]


@given(st.integers(0, (1 << 63) - 1))
def test_what_is_shown_is_nearly_what_is_read(size: int) -> None:
    read = parse_size(human_size(size))
    assert read is not None
    assert abs(read - size) <= size / 100


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (65536, "64K"),
        (10 * 2**20 + 1, "10M"), (5 * 2**29, "2.5G"), (2**40, "1T"),
        (1023 * 2**20 + 2**19, "1024M"),
        (1234 * 2**30, "1.21T"), (2**63 - 1, "8E"), (2**70, "1024E"),
    ],
)  # fmt: skip
def test_human_sizes(size: int, words: str) -> None:
    assert human_size(size) == words


def test_a_share_of_a_whole_is_exact() -> None:
    assert Amount(percent=Fraction(100)).of((1 << 50) + 3) == (1 << 50) + 3
    assert Amount(percent=Fraction("33.3")).of(1000) == 333
    assert Amount(7).of(1000) == 7
    assert (str(Amount(7)), str(Amount(percent=Fraction("12.5")))) == ("7", "12.5%")
