"""Options as text, and out of it."""

import pytest

from qmpblock.graph.jsonname import as_bytes, as_name, as_text, from_text, innermost, said_by

FILE = {"driver": "file", "filename": "/i/disk"}


def test_text():
    options = {"driver": "qcow2", "file": FILE, "backing": None}
    assert from_text(as_text(options)) == options
    assert said_by(as_name(options)) == options
    assert as_name(FILE) == 'json:{"driver": "file", "filename": "/i/disk"}'


@pytest.mark.parametrize("text", ["", "[]", "5", "{", '{"driver": "ra', "[" * 100_000])
def test_what_is_none_says_nothing(text):
    assert from_text(text) == {}
    assert said_by(f"json:{text}") == {}


def test_a_plain_name_says_nothing():
    assert said_by('/i/json:{"driver": "raw"}') == {}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (FILE, FILE),
        ({"driver": "raw", "file": {"driver": "raw", "file": FILE}}, FILE),
        ({"driver": "qcow2", "file": "node"}, {}),
        (None, {}),
    ],
)
def test_innermost(options, found):
    assert innermost(options) == found


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0100", 100),  # decimal, to QEMU too
        ("1M", 1 << 20),
        ("1m", 1 << 20),
        ("512B", 512),
        ("2E", 1 << 61),
        ("0x200", 512),
        ("0X2B", 0x2B),
    ],
)
def test_numbers_as_they_were_given(value, number):
    assert as_bytes(value) == number


@pytest.mark.parametrize("value", [None, True, -1, 1.0, [1], "", "-1", "1.5M", "1_0", "0x1G", "M"])
def test_what_is_no_number_is_not_guessed_at(value):
    with pytest.raises(ValueError, match="no number"):
        as_bytes(value)
