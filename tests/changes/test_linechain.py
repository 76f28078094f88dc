"""Lines that prove who wrote them: every change of them is seen, but for an end that is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.changes.linechain import lines_of, proving, sealed

KEY, OTHER = b"k" * 32, b"o" * 32


def chain(*entries, key=KEY):
    text = b""
    for entry in entries:
        text += sealed(key, text, entry)
    return text


WHOLE = chain({"run": "deadbeef"}, {"pivoted": False}, {"made": "x"}, {"pivoted": True})
LINES = WHOLE.splitlines(keepends=True)


def test_the_key_that_wrote_them_proves_them():
    assert proving([OTHER, KEY], WHOLE) == KEY
    assert proving([OTHER], WHOLE) is None
    assert proving([], WHOLE) is None
    assert proving([KEY], b"") is None


def test_without_a_key_nothing_is_proven():
    assert proving([KEY], chain({"run": "x"}, key=None)) is None
    assert chain({"run": "x"}, key=None) == b'{"run": "x"}\n'


@pytest.mark.parametrize("missing", range(3))
def test_none_can_be_left_out(missing):
    assert proving([KEY], b"".join(LINES[:missing] + LINES[missing + 1 :])) is None


def test_what_is_missing_at_the_end_is_not_seen():
    """That is why the state directory's word comes first."""
    for count in range(1, 5):
        assert proving([KEY], b"".join(LINES[:count])) == KEY


def test_they_keep_their_order_and_their_file():
    a, b, c, d = LINES
    other = chain({"run": "cafebabe"}, {"pivoted": True})
    for mixed in ([a, c, b, d], [b], [a, d], [a, b, b], [a, other.splitlines(keepends=True)[1]]):
        assert proving([KEY], b"".join(mixed)) is None


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(position, flip):
    changed = bytearray(WHOLE)
    changed[position] ^= flip
    lines = lines_of(bytes(changed))
    # A last newline that goes takes its line with it: a torn one, which was never acted upon.
    assert proving([KEY], lines) is None or WHOLE.startswith(lines)


@given(st.binary(max_size=300))
def test_bytes_that_are_anything_prove_nothing(data):
    assert proving([KEY], lines_of(data)) is None
