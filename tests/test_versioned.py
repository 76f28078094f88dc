"""What another version wrote: defaults for what is absent, what is not known is kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock import __version__
from qmpblock.versioned import FORMAT, UnreadableError, plain, read, stamped, unstamped


@dataclass(frozen=True)
class Inner:
    pid: int
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    node: str | None = None
    pairs: tuple[tuple[str, int], ...] = ()
    done: bool = False
    free: Mapping[str, object] = field(default_factory=dict)
    more: Mapping[str, object] = field(default_factory=dict)


WHOLE = Outer("n", Inner(1), "x", (("a", 1), ("b", 2)), True, {"k": [1]})


def through_json(value):
    return json.loads(json.dumps(value))


def test_it_reads_back():
    assert read(Outer, through_json(plain(WHOLE))) == WHOLE


@pytest.mark.parametrize("name", ["node", "pairs", "done", "free"])
def test_what_is_absent_has_its_default(name):
    data = through_json(plain(WHOLE))
    del data[name]
    assert getattr(read(Outer, data), name) == getattr(Outer("", Inner(0)), name)


@pytest.mark.parametrize("path", [("name",), ("inner",), ("inner", "pid")])
def test_without_what_has_none_it_cannot_be_read(path):
    data = through_json(plain(WHOLE))
    *above, name = path
    del (data[above[0]] if above else data)[name]
    with pytest.raises(UnreadableError, match=f"field {name} is absent"):
        read(Outer, data)


def test_what_is_not_known_is_kept_and_written_back():
    data = through_json(plain(WHOLE))
    data["later"] = {"a": [1]}
    data["inner"]["later"] = None
    found = read(Outer, data)
    assert (found.more, found.inner.more) == ({"later": {"a": [1]}}, {"later": None})
    assert through_json(plain(found)) == data


def test_a_field_that_is_called_more_is_as_any_other_that_is_not_known():
    data = through_json(plain(WHOLE)) | {"more": {"name": "forged"}}
    found = read(Outer, data)
    assert found.name == "n"
    assert through_json(plain(found)) == data


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1},
        {"name": None},
        {"inner": 5},
        {"inner": {"pid": True}},
        {"inner": {"pid": "1"}},
        {"node": 1},
        {"pairs": [["a"]]},
        {"pairs": [["a", "b"]]},
        {"pairs": "ab"},
        {"done": 1},
        {"free": []},
    ],
)
def test_another_type_cannot_be_read(change):
    with pytest.raises(UnreadableError, match=r"another type|no JSON object"):
        read(Outer, through_json(plain(WHOLE)) | change)


def test_the_stamp_says_who_wrote_it():
    data = stamped({"a": 1})
    assert data == {"format": FORMAT, "version": __version__, "a": 1}
    assert unstamped(through_json(data)) == {"a": 1}


def test_what_was_written_before_there_was_a_stamp_is_of_the_first_format():
    assert unstamped({"a": 1}) == {"a": 1}


def test_a_newer_format_names_the_version_that_wrote_it():
    with pytest.raises(UnreadableError) as caught:
        unstamped({"format": FORMAT + 1, "version": "9.8.7\x1b", "a": 1})
    said = str(caught.value)
    assert f"format {FORMAT + 1}, written by qmpblock 9.8.7" in said
    assert f"this is qmpblock {__version__}" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("number", [0, -1, True, "1", None, 1.0])
def test_a_format_that_is_none(number):
    with pytest.raises(UnreadableError, match="format is no number"):
        unstamped({"format": number})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    )
)
def test_anything_else_is_said_to_be_unreadable(data):
    with pytest.raises(UnreadableError):
        read(Outer, unstamped(data) if isinstance(data, dict) else data)
    if not isinstance(data, dict):
        with pytest.raises(UnreadableError, match="no JSON object"):
            unstamped(data)
