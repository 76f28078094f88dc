"""Records: what is read is what was written, by whatever version, and only if we wrote it."""

import json
import os
from dataclasses import fields, replace

import pytest
from drawing import RUN, VM, record
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.changes import operations
from qmpblock.changes.copies import Copy, Migration, Move
from qmpblock.changes.operations import (
    ActiveCommit,
    Commit,
    FrozenCopy,
    ManagersCommit,
    ManagersMove,
    ManagersPivot,
    ManagersSnapshot,
    ManagersStaging,
    PointInTime,
    Snapshot,
    StagedCommit,
    Stream,
    ThinAllocation,
    read_record,
)
from qmpblock.changes.record import VMIdentity
from qmpblock.versioned import UnreadableError

PREFIX = f"qmpblock-{RUN}-"
words = st.text(max_size=6)
numbers = st.integers(0, 1 << 62)
ours = words.map(lambda word: PREFIX + word)


def some(strategy):
    return st.lists(strategy, max_size=3).map(tuple)


#: What a later version may have added.
unknown = st.dictionaries(st.sampled_from(["later", "x"]), st.none() | words | numbers)
ZEROES = st.sampled_from(["", "off", "on", "unmap"])
DISCARDS = st.sampled_from(["", "ignore", "unmap"])
FIELDS = {
    "run": st.just(RUN),
    "vm": st.builds(VMIdentity, words, words, numbers, numbers, words, words, unknown),
    "devices": some(words),
    "names": some(words),
    "locks": some(words.map(lambda word: f"qmpblock-disk-{word}")),
    "job": st.just(""),  # of its kind, below
    "helpers": some(ours),
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
    "detect_zeroes": ZEROES,
    "discard": DISCARDS,
    "settings": some(st.tuples(ours, DISCARDS, ZEROES)),
    "images": some(words),
    "known_as": words,
    "managed_as": some(words),
    "source_files": some(words),
    "wires": some(st.tuples(ours, words)),
    "drawn": some(st.tuples(words, words)),
    "noted": some(st.tuples(words, ours)),
    "overlays": some(st.tuples(words, words, words, words)),
    "sources": some(words),
    "targets": some(words),
    "kept": some(words),
    "more": unknown,
}
KINDS = (
    *(Snapshot, Stream, Commit, ActiveCommit, ThinAllocation, StagedCommit, PointInTime),
    *(Copy, Move, FrozenCopy, Migration, ManagersSnapshot, ManagersCommit, ManagersPivot),
    *(ManagersStaging, ManagersMove),
)


PIVOTING = (ActiveCommit, StagedCommit, FrozenCopy, ManagersPivot, ManagersStaging)


def of(kind):
    """Return records of one operation."""
    names = [one.name for one in fields(kind)]
    made = st.builds(kind, **{name: FIELDS[name] for name in names})
    jobs = (ours.filter(lambda job: not job.endswith("-pivot")), st.just(f"{PREFIX}pivot"))
    return st.tuples(made, jobs[kind in PIVOTING]).map(lambda both: replace(both[0], job=both[1]))


records = st.sampled_from(KINDS).flatmap(of)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(records)
def test_a_record_reads_back(wanted):
    assert read_record(json.loads(json.dumps(wanted.as_json()))) == wanted


@given(records)
def test_what_an_older_version_wrote_beside_it_says_nothing(wanted):
    """One class had the fields of all operations, most of them empty."""
    said = json.loads(json.dumps(wanted.as_json()))
    empty = {"pivot": False, "throttle_group": "", "flush": "", "merges": [], "written": []}
    assert read_record(empty | said) == wanted


def test_every_operation_and_field_is_tried_above():
    """A new one must not be forgotten there."""
    assert set(KINDS) == set(operations._KINDS.values())
    assert set(FIELDS) == {field.name for kind in KINDS for field in fields(kind)}


def test_names_that_are_no_unicode_survive():
    """A file name is bytes; Python shows the odd ones as lone surrogates."""
    odd = record(images=(os.fsdecode(b"/i/\xff"),), names=("\x1b[2J",))
    assert read_record(json.loads(json.dumps(odd.as_json()))) == odd
    assert "\x1b" not in odd.describe()


@given(json_values)
def test_what_is_no_record_is_unreadable(data):
    with pytest.raises(UnreadableError):
        read_record(data)


@given(records, st.data())
def test_a_field_of_the_wrong_kind_is_no_record(wanted, data):
    forged = wanted.as_json()
    name = data.draw(st.sampled_from(sorted(forged)))
    forged[name] = data.draw(json_values)
    try:
        found = read_record(json.loads(json.dumps(forged)))
    except UnreadableError:
        return
    # It fitted by chance, and then it is exactly that; it may be of another kind by then.
    said, forged = json.loads(json.dumps([found.as_json(), forged]))
    assert read_record(said) == found
    for name, value in said.items():
        assert forged.get(name, value) == value
    for name, value in forged.items():
        assert said.get(name) == value or (name not in said and not value)


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
    good = record(
        operation="commit",
        pivot=True,
        job=f"{PREFIX}pivot",
        nodes=(f"{PREFIX}0",),
        helpers=(f"{PREFIX}create-0",),
    )
    assert read_record(good.as_json()) == good
    with pytest.raises(UnreadableError):
        read_record(replace(good, **forged).as_json())


def test_it_is_of_its_run_and_no_other():
    assert read_record(record().as_json(), RUN) == record()
    with pytest.raises(UnreadableError, match="run"):
        read_record(record().as_json(), "cafebabe")


@pytest.mark.parametrize("operation", ["", "mirror", "\x1b"])
def test_an_operation_that_this_version_does_not_know(operation):
    """What it means for the images, and how it is undone, only a newer one can say."""
    with pytest.raises(UnreadableError, match="operation") as caught:
        read_record(record().as_json() | {"operation": operation})
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("operation", ["snapshot", "stream"])
def test_an_operation_that_does_not_pivot(operation):
    said = record(operation=operation).as_json() | {"pivot": True}
    with pytest.raises(UnreadableError, match="does not pivot"):
        read_record(said)


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
    images=("/i/t", "/i/b"),
)


@pytest.mark.parametrize("name", [name for name in FULL.as_json() if name != "more"])
def test_every_field_may_be_absent_or_it_is_said(name):
    data = json.loads(json.dumps(FULL.as_json()))
    del data[name]
    if name in NEEDED | CONTRADICTED:
        with pytest.raises(UnreadableError, match=name if name in NEEDED else "pivot"):
            read_record(data)
    else:
        default = getattr(ActiveCommit("", VM, (), (), ()), name)
        assert read_record(data) == replace(FULL, **{name: default})


@pytest.mark.parametrize("name", [one.name for one in fields(VMIdentity) if one.name != "more"])
def test_without_which_qemu_it_was_it_cannot_be_read(name):
    data = json.loads(json.dumps(FULL.as_json()))
    del data["vm"][name]
    with pytest.raises(UnreadableError, match=name):
        read_record(data)


def test_what_a_later_version_added_is_kept():
    data = json.loads(json.dumps(FULL.as_json()))
    data["later"] = {"a": [1]}
    data["vm"]["later"] = 5
    found = read_record(data)
    assert found.more == {"later": {"a": [1]}}
    assert json.loads(json.dumps(replace(found, base="other").as_json())) == data | {
        "base": "other"
    }


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        (Stream, "images"),
        (Commit, "images"),
        (ActiveCommit, "images"),
        (ActiveCommit, "top_file"),
        (ActiveCommit, "base_file"),
        (Snapshot, "images"),
        (Snapshot, "files"),
        (StagedCommit, "images"),
        (StagedCommit, "top_file"),
        (StagedCommit, "base_file"),
        (StagedCommit, "files"),
        (StagedCommit, "base_format"),
        (FrozenCopy, "top_file"),
        (FrozenCopy, "base_format"),
    ],
)
def test_what_is_needed_once_qemu_is_gone(kind, absent):
    """A default there would have another image started than the newest one."""
    said = {
        "images": ("/i/t", "/i/b"),
        "files": ("/i/o",),
        "top_file": "/i/t",
        "base_file": "/i/b",
        "base_format": "qcow2",
    }
    its = {one.name for one in fields(kind)}
    whole = kind(RUN, VM, (), (), (), **{name: said[name] for name in said if name in its})
    whole.check_journaled()
    empty = getattr(kind("", VM, (), (), ()), absent)
    with pytest.raises(UnreadableError, match=absent):
        replace(whole, **{absent: empty}).check_journaled()


def test_a_thin_allocation_has_no_journal():
    """One that says so has lost the word that it pivots."""
    with pytest.raises(UnreadableError, match="pivot"):
        record(operation="allocate").check_journaled()


def test_only_what_pivots_has_a_home():
    assert record(top_file="/i/a").home == ""
    pivot = record(operation="commit", pivot=True, top_file="/i/a", base_file="/i/b")
    assert pivot.home == "/i/a"
    staged = record(operation="allocate", pivot=True, top_file="/i/t", base_file="/i/a")
    assert staged.home == "/i/a"  # the image, not the overlay of ours, which goes
