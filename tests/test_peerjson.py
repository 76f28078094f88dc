"""JSON from peers: what is read as json.loads reads it, and what is refused."""

import json
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.peerjson import MOST_BYTES, MOST_LEVELS, MOST_VALUES, RefusedError, read_json

# What QEMU may say: no NUL, no half of a surrogate pair.
TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)


@settings(max_examples=50)
@given(VALUES, st.booleans())
def test_whatever_a_peer_may_say_is_read_as_it_is(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert read_json(data) == value


@given(st.binary())
def test_whatever_else_comes_is_refused_or_is_json(data):
    try:
        found = read_json(data)
    except RefusedError as error:
        assert str(error)
    else:
        assert found == json.loads(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),  # half a pair in bytes, which json.loads lets through
        ("[]".encode("utf-16"), "UTF-8|no JSON"),  # and this
        (rb'"\ud800"', "surrogate"),
        (rb'{"\udfff": 1}', "surrogate"),
        (rb'[["a", {"b": "c\uD9ffd"}]]', "surrogate"),
        (rb'"a\u0000b"', "NUL"),
        (b"1e999", "too large"),
        (b"-1e999", "too large"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"-Infinity", "-Infinity"),
        (b"18446744073709551616", "64 bits"),
        (b"-9223372036854775809", "64 bits"),
        (b"9" * 10_000, "64 bits"),
        (b"[" * 100_000, "levels"),
        (b"[" * 100_000 + b"]" * 100_000, "levels"),
        (b'{"a":' * (MOST_LEVELS + 1) + b"1" + b"}" * (MOST_LEVELS + 1), "levels"),
        (b"[" + b"1," * MOST_VALUES + b"1]", "values"),
        (b"[" + b"[]," * (MOST_VALUES // 2 + 1) + b"1]", "values"),
        (b'"' + b"x" * MOST_BYTES + b'"', "bytes"),
    ],
)
def test_what_is_refused(data, words):
    with pytest.raises(RefusedError, match=words):
        read_json(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"18446744073709551615", (1 << 64) - 1),
        (b"-9223372036854775808", -(1 << 63)),
        (rb'"\ud83d\ude00"', "\U0001f600"),
        (rb'"\\ud800 \\u0000"', r"\ud800 \u0000"),  # backslashes of the text's own
        (b'"00000000000000000000000000"', "0" * 26),
        (b"1.5e3", 1500.0),
    ],
)
def test_what_is_not(data, value):
    assert read_json(data) == value


def test_the_deepest_that_is_read_can_be_shown():
    data = b"[" * MOST_LEVELS + b"]" * MOST_LEVELS
    assert repr(read_json(data)).encode() == data


@pytest.mark.parametrize("one", [b"[]", b"{}", b'{"a":1}', b'{"a":{"b":{"c":{"d":1}}}}', b'"x"'])
def test_a_value_costs_what_is_said(one):
    each, count = one.count(b"{") + one.count(b"[") + 1, 10_000
    data = b"[" + one + (b"," + one) * (count - 1) + b"]"
    tracemalloc.start()
    try:
        found = read_json(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert peak < count * each * 250


def test_the_limits_leave_room_for_python():
    """Its own limit would come first else, and depend on who calls."""
    assert sys.getrecursionlimit() - 300 > MOST_LEVELS
