"""Records: what is read is what was written, by whatever version, and only if we wrote it."""

import json
import os
from dataclasses import fields, replace

import pytest
from drawing import RUN, VM, record
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.changes.record import OPERATIONS, Record, VMIdentity
from qmpblock.versioned import UnreadableError

PREFIX = f"qmpblock-{RUN}-"
words = st.text(max_size=6)
numbers = st.integers(0, 1 << 62)
ours = words.map(lambda word: PREFIX + word)


def some(strategy):
    return st.lists(strategy, max_size=3).map(tuple)


#: What a later version may have added.
unknown = st.dictionaries(st.sampled_from(["later", "x"]), st.none() | words | numbers)
FIELDS = {
    "run": st.just(RUN),
    "operation": st.sampled_from(OPERATIONS),
    "vm": st.builds(VMIdentity, words, words, numbers, numbers, words, words, unknown),
    "devices": some(words),
    "names": some(words),
    "locks": some(words.map(lambda word: f"qmpblock-disk-{word}")),
    "job": ours,
    "helpers": some(ours),
    "pivot": st.booleans(),
    "flush": words,
    "keeper": words,
    "top": words,
    "base": words,
    "top_file": words,
    "base_file": words,
    "base_format": words,
    "base_opened": st.just("") | st.just('{"driver": "x"}'),
    "written": some(st.tuples(words, numbers)),
    "backing_name": words,
    "leaving": some(st.tuples(words, words)),
    "nodes": some(ours),
    "files": some(words),
    "bitmaps": some(st.tuples(words, words)),
    "promotions": some(st.tuples(words, words, words, numbers)),
    "merges": some(st.tuples(words, words, words)),
    "throttle": some(st.tuples(words, numbers)),
    "throttle_group": words,
    "detect_zeroes": st.sampled_from(["", "off", "on", "unmap"]),
    "discard": st.sampled_from(["", "ignore", "unmap"]),
    "images": some(words),
    "more": unknown,
}
records = st.builds(Record, **FIELDS).map(
    # Whether it pivots its job's name says too.
    lambda made: replace(made, job=f"{PREFIX}pivot" if made.pivot else f"{PREFIX}job")
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(records)
def test_a_record_reads_back(wanted):
    assert Record.from_json(json.loads(json.dumps(wanted.as_json()))) == wanted


def test_every_field_is_tried_above():
    """A new one must not be forgotten there."""
    assert set(FIELDS) == {field.name for field in fields(Record)}


def test_names_that_are_no_unicode_survive():
    """A file name is bytes; Python shows the odd ones as lone surrogates."""
    odd = record(images=(os.fsdecode(b"/i/\xff"),), names=("\x1b[2J",))
    assert Record.from_json(json.loads(json.dumps(odd.as_json()))) == odd
    assert "\x1b" not in odd.describe()


@given(json_values)
def test_what_is_no_record_is_unreadable(data):
    with pytest.raises(UnreadableError):
        Record.from_json(data)


@given(records, st.data())
def test_a_field_of_the_wrong_kind_is_no_record(wanted, data):
    forged = wanted.as_json()
    name = data.draw(st.sampled_from(sorted(forged)))
    forged[name] = data.draw(json_values)
    try:
        found = Record.from_json(json.loads(json.dumps(forged)))
    except UnreadableError:
        return
    # It fitted by chance, and then it is exactly that.
    assert json.loads(json.dumps(found.as_json())) == json.loads(json.dumps(forged))


@pytest.mark.parametrize(
    "forged",
    [
        {"nodes": ("disk0",)},
        {"nodes": ("qmpblock-", "disk0")},
        {"nodes": (f"{PREFIX}0", f"x{PREFIX}1")},
        {"nodes": ("qmpblock-cafebabe-0",)},  # of another run of ours, which may live
        {"helpers": ("backup0",)},
        {"job": "backup0"},
        {"job": f"qmpblock-{RUN}"},
        {"locks": ("qmpblock-nbd",)},
        {"locks": ("sec0",)},
        {"detect_zeroes": 'off"; quit "'},
        {"discard": 'unmap"; quit "'},
        {"base_opened": "{}"},
        {"base_opened": "x"},
        {"run": "DEADBEEF"},
        {"run": "deadbee"},
        {"run": f"{RUN}\n"},
        {"run": "../../ab"},
        {"run": ""},
    ],
)
def test_a_record_that_names_what_is_not_ours_is_none(forged):
    """What it names is deleted, cancelled and dismissed."""
    good = record(job=f"{PREFIX}stream", nodes=(f"{PREFIX}0",), helpers=(f"{PREFIX}create-0",))
    assert Record.from_json(good.as_json()) == good
    with pytest.raises(UnreadableError):
        Record.from_json(replace(good, **forged).as_json())


def test_it_is_of_its_run_and_no_other():
    assert Record.from_json(record().as_json(), RUN) == record()
    with pytest.raises(UnreadableError, match="run"):
        Record.from_json(record().as_json(), "cafebabe")


@pytest.mark.parametrize("operation", ["", "mirror", "\x1b"])
def test_an_operation_that_this_version_does_not_know(operation):
    """What it means for the images, and how it is undone, only a newer one can say."""
    with pytest.raises(UnreadableError, match="operation") as caught:
        Record.from_json(record(operation=operation).as_json())
    assert "\x1b" not in str(caught.value)


# another version's

#: What a change says, as long as there are changes.
NEEDED = {"run", "operation", "vm", "devices", "names", "locks"}
#: By default that is contradicted by the rest of a record of a pivot.
CONTRADICTED = {"pivot"}
FULL = record(
    operation="commit",
    job=f"{PREFIX}pivot",
    helpers=(f"{PREFIX}create-0",),
    pivot=True,
    top="t",
    base="b",
    top_file="/i/t",
    base_file="/i/b",
    leaving=(("t", "/i/t"),),
    merges=(("a", "b", "c"),),
    images=("/i/t", "/i/b"),
)


@pytest.mark.parametrize("name", [one.name for one in fields(Record) if one.name != "more"])
def test_every_field_may_be_absent_or_it_is_said(name):
    data = json.loads(json.dumps(FULL.as_json()))
    del data[name]
    if name in NEEDED | CONTRADICTED:
        with pytest.raises(UnreadableError, match=name if name in NEEDED else "pivot"):
            Record.from_json(data)
    else:
        default = getattr(Record("", "", VM, (), (), ()), name)
        assert Record.from_json(data) == replace(FULL, **{name: default})


@pytest.mark.parametrize("name", [one.name for one in fields(VMIdentity) if one.name != "more"])
def test_without_which_qemu_it_was_it_cannot_be_read(name):
    data = json.loads(json.dumps(FULL.as_json()))
    del data["vm"][name]
    with pytest.raises(UnreadableError, match=name):
        Record.from_json(data)


def test_what_a_later_version_added_is_kept():
    data = json.loads(json.dumps(FULL.as_json()))
    data["later"] = {"a": [1]}
    data["vm"]["later"] = 5
    found = Record.from_json(data)
    assert found.more == {"later": {"a": [1]}}
    assert json.loads(json.dumps(replace(found, base="other").as_json())) == data | {
        "base": "other"
    }


@pytest.mark.parametrize(
    ("operation", "absent"),
    [
        ("stream", "images"),
        ("commit", "images"),
        ("commit", "top_file"),
        ("commit", "base_file"),
        ("snapshot", "files"),
        ("allocate", "files"),
        ("allocate", "base_format"),
        ("allocate", "pivot"),
    ],
)
def test_what_is_needed_once_qemu_is_gone(operation, absent):
    """A default there would have another image started than the newest one."""
    pivots = operation in ("commit", "allocate")
    whole = replace(
        FULL,
        operation=operation,
        pivot=pivots,
        job=f"{PREFIX}{'pivot' if pivots else 'stream'}",
        base_format="qcow2",
        files=("/i/o",),
    )
    whole.check_journaled()
    empty = getattr(Record("", "", VM, (), (), ()), absent)
    with pytest.raises(UnreadableError, match=absent):
        replace(whole, **{absent: empty}).check_journaled()


def test_only_what_pivots_has_a_home():
    assert record(top_file="/i/a").home == ""
    pivot = record(operation="commit", pivot=True, top_file="/i/a", base_file="/i/b")
    assert pivot.home == "/i/a"
    staged = replace(pivot, operation="allocate", top_file="/i/t", base_file="/i/a")
    assert staged.home == "/i/a"  # the image, not the overlay of ours, which goes
