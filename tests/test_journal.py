"""The journal: what is read is what was written, and only if we wrote it."""

import errno
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from drawing import RUN, VM, record
from hypothesis import given
from hypothesis import strategies as st

from qmpblock import journal as module
from qmpblock.errors import Error
from qmpblock.journal import (
    Journal,
    Record,
    VMIdentity,
    discard_torn,
    journals,
    pivoted,
    state_directory,
)

PREFIX = f"qmpblock-{RUN}-"
words = st.text(max_size=6)
numbers = st.integers(0, 1 << 62)
ours = words.map(lambda word: PREFIX + word)


def some(strategy):
    return st.lists(strategy, max_size=3).map(tuple)


FIELDS = {
    "run": st.just(RUN),
    "operation": words,
    "vm": st.builds(VMIdentity, words, words, numbers, numbers, words, words),
    "devices": some(words),
    "names": some(words),
    "locks": some(words.map(lambda word: f"qmpblock-disk-{word}")),
    "job": st.just("") | ours,
    "helpers": some(ours),
    "pivot": st.booleans(),
    "flush": words,
    "keeper": words,
    "top": words,
    "base": words,
    "top_file": words,
    "base_file": words,
    "base_format": words,
    "leaving": some(st.tuples(words, words)),
    "nodes": some(ours),
    "files": some(words),
    "bitmaps": some(st.tuples(words, words)),
    "promotions": some(st.tuples(words, words, words, numbers)),
    "merges": some(st.tuples(words, words, words)),
    "throttle": some(st.tuples(words, numbers)),
    "throttle_group": words,
    "detect_zeroes": st.sampled_from(["", "on", "unmap"]),
    "images": some(words),
}
records = st.builds(Record, **FIELDS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Keep journals out of the real state directory."""
    where = tmp_path / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"image")
    return path


def of_pivot(image, **changes):
    """Return the record of an active commit of `image`."""
    wanted = {"operation": "commit", "pivot": True, "top_file": str(image)}
    return record(**(wanted | changes))


def beside(image, run=RUN):
    return image.with_name(f"{image.name}.qmpblock-{run}.journal")


# records


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
def test_what_is_no_record_is_none(data):
    assert Record.from_json(data) is None


@given(records, st.data())
def test_a_field_of_the_wrong_kind_is_no_record(wanted, data):
    forged = wanted.as_json()
    name = data.draw(st.sampled_from(sorted(forged)))
    forged[name] = data.draw(json_values)
    found = Record.from_json(json.loads(json.dumps(forged)))
    if found is not None:  # it fitted by chance, and then it is exactly that
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
    assert Record.from_json(replace(good, **forged).as_json()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("merges"),
        lambda data: data.update(more=1),
        lambda data: data["vm"].pop("boot"),
        lambda data: data["vm"].update(pid=True),
        lambda data: data.update(pivot=1),
        lambda data: data.update(leaving=[["a"]]),
        lambda data: data.update(leaving=[["a", "b", "c"]]),
        lambda data: data.update(devices="vd0"),
        lambda data: data.update(promotions=[["a", "b", "c", "d"]]),
    ],
)
def test_a_record_of_another_shape_is_none(change):
    data = json.loads(json.dumps(record(leaving=(("d1", "/i/d1"),)).as_json()))
    change(data)
    assert Record.from_json(data) is None


def test_only_what_pivots_has_a_home():
    assert record(top_file="/i/a").home == ""
    assert of_pivot("/i/a", base_file="/i/b").home == "/i/a"
    staged = of_pivot("/i/t", operation="allocate", base_file="/i/a")
    assert staged.home == "/i/a"  # the image, not the overlay of ours, which goes


# where it is, and who may read it


def test_state_directory(monkeypatch, tmp_path):
    assert state_directory() == tmp_path / "state"
    monkeypatch.delenv("QMPBLOCK_STATE")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_directory() == Path("/var/lib/qmpblock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert state_directory() == Path("/x/qmpblock")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert state_directory() == Path("/h/.local/state/qmpblock")


def test_made_for_this_user_alone(state, image):
    journal = Journal.create(of_pivot(image), image)
    assert journal.paths[1] == beside(image)
    assert state.stat().st_mode & 0o777 == 0o700
    for path in journal.paths:
        assert path.stat().st_mode & 0o777 == 0o600
        assert Record.from_json(json.loads(path.read_text())) == journal.record


def test_two_disks_of_a_vm_have_two_journals(state):
    one = Journal.create(record())
    two = Journal.create(record(run="cafebabe", devices=("/machine/peripheral/vd1",)))
    assert one.paths != two.paths
    assert {found.record.run for found in journals()} == {RUN, "cafebabe"}


def test_a_directory_that_cannot_be_made(state):
    state.write_text("a file")
    with pytest.raises(Error, match="cannot write the journal") as caught:
        Journal.create(record())
    assert caught.value.standing == "nothing was changed"
    assert "QMPBLOCK_STATE" in caught.value.remedy


def test_no_room_beside_the_image_leaves_none_at_all(state, tmp_path):
    gone = tmp_path / "gone" / "disk.qcow2"
    with pytest.raises(Error, match="gone") as caught:
        Journal.create(of_pivot(gone), gone)
    assert "directory of the image" in caught.value.remedy
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("trap", ["file", "link"])
def test_what_lies_in_its_place_is_not_touched(state, image, trap):
    """Others may write to the directory of an image, and lay a trap there."""
    victim = image.with_name("victim")
    victim.write_text("precious")
    if trap == "link":
        beside(image).symlink_to(victim)
    else:
        beside(image).write_text("not ours")
    with pytest.raises(Error, match="File exists"):
        Journal.create(of_pivot(image), image)
    assert victim.read_text() == "precious"
    assert beside(image).exists()
    assert list(state.iterdir()) == []


# what is written, and when it is stable


class Disk:
    """Notes what is written and made stable, in order, by path."""

    def __init__(self, monkeypatch):
        self.seen = []
        write, fsync = os.write, os.fsync
        self.fail = {}

        def path(fd):
            return Path(os.readlink(f"/proc/self/fd/{fd}")).name

        def noting_write(fd, data):
            self.seen.append(("write", path(fd)))
            if "write" in self.fail:
                write(fd, data[: len(data) // 2])
                raise OSError(self.fail["write"], os.strerror(self.fail["write"]))
            return write(fd, data)

        def noting_fsync(fd):
            self.seen.append(("fsync", path(fd)))
            if "fsync" in self.fail:
                raise OSError(self.fail["fsync"], os.strerror(self.fail["fsync"]))
            fsync(fd)

        monkeypatch.setattr(os, "write", noting_write)
        monkeypatch.setattr(os, "fsync", noting_fsync)


def test_each_file_is_stable_before_its_name_and_before_the_call_returns(image, monkeypatch):
    disk = Disk(monkeypatch)
    journal = Journal.create(of_pivot(image), image)
    wanted = []
    for path in journal.paths:
        wanted += [("write", path.name), ("fsync", path.name), ("fsync", path.parent.name)]
    assert disk.seen == wanted


def test_an_entry_is_stable_in_both_places(image, monkeypatch):
    journal = Journal.create(of_pivot(image), image)
    disk = Disk(monkeypatch)
    journal.add(made="x")
    first, second = (path.name for path in journal.paths)
    assert disk.seen == [(what, name) for name in (first, second) for what in ("write", "fsync")]


def test_what_the_guest_waits_for_costs_one_fsync(image, monkeypatch):
    journal = Journal.create(of_pivot(image), image)
    disk = Disk(monkeypatch)
    journal.mark(pivoted=True)
    name = beside(image).name
    assert disk.seen == [("write", name), ("fsync", name)]
    assert journal.pivoted


def test_a_removed_name_stays_removed(image, monkeypatch):
    journal = Journal.create(of_pivot(image), image)
    disk = Disk(monkeypatch)
    journal.remove()
    assert disk.seen == [("fsync", path.parent.name) for path in journal.paths]
    assert not any(path.exists() for path in journal.paths)
    journal.remove()  # idempotent


@pytest.mark.parametrize(("call", "number"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_an_entry_that_was_not_written_is_not_there(image, monkeypatch, call, number):
    """Neither half of it, nor all of it: nobody acted upon it."""
    journal = Journal.create(of_pivot(image), image)
    journal.add(made="x")
    with monkeypatch.context() as patching:
        Disk(patching).fail = {call: number}
        with pytest.raises(Error, match=os.strerror(number)):
            journal.mark(pivoted=True)
    assert not journal.pivoted
    assert Journal.load(beside(image)).entries == [{"made": "x"}]
    journal.mark(pivoted=True)
    assert Journal.load(beside(image)).entries == [{"made": "x"}, {"pivoted": True}]


def test_a_journal_that_was_removed_is_not_made_anew(image):
    """A line without its record would be none of ours."""
    journal = Journal.create(of_pivot(image), image)
    beside(image).unlink()
    with pytest.raises(Error, match="No such file"):
        journal.mark(pivoted=True)
    assert not beside(image).exists()


def test_restart_forgets_the_entries_alone(image):
    journal = Journal.create(of_pivot(image), image)
    journal.add(made="x")
    journal.mark(pivoted=True)
    journal.restart()
    assert not journal.pivoted
    journal.add(made="y")
    for path in journal.paths:
        again = Journal.load(path)
        assert again.record == journal.record
        assert again.entries == [{"made": "y"}]


def test_restart_says_when_it_cannot(image):
    journal = Journal.create(of_pivot(image), image)
    journal.add(made="x")
    beside(image).unlink()
    with pytest.raises(Error, match="cannot write to the journal"):
        journal.restart()
    assert journal.entries == [{"made": "x"}]


# reading it after a crash


def test_torn_anywhere_it_tells_what_was_whole(image):
    """Cut after every byte, as by a host that lost power."""
    journal = Journal.create(of_pivot(image), image)
    for entry in ({"made": "é\n"}, {"pivoted": True}, {"pivoted": False}):
        journal.add(**entry)
    path = beside(image)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = sum(end <= length for end in ends)
        found = Journal.load(path)
        if lines:
            assert found.entries == journal.entries[: lines - 1]
        else:
            assert found is None


@pytest.mark.parametrize("tear", [1, 5, 14])
def test_going_on_after_a_torn_line(image, tear):
    """The next controller adopts the change: its first word must not drown in the torn one."""
    journal = Journal.create(of_pivot(image), image)
    journal.add(made="x")
    journal.add(pivoted=False)
    path = beside(image)
    path.write_bytes(path.read_bytes()[:-tear])
    again = Journal.load(path)
    assert again.entries == [{"made": "x"}]
    again.mark(pivoted=True)
    assert Journal.load(path).entries == [{"made": "x"}, {"pivoted": True}]


@pytest.mark.parametrize("line", ["[]", "5", "not json", "null", "", '"pivoted"'])
def test_a_line_that_is_no_entry_spoils_the_journal(image, line):
    journal = Journal.create(of_pivot(image), image)
    path = beside(image)
    path.write_text(f"{path.read_text()}{line}\n")
    assert Journal.load(path) is None
    assert [found.paths for found in journals()] == [journal.paths[:1]]


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_journal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "arbitrary.journal"
    path.write_bytes(data)
    assert Journal.load(path) is None


def test_a_journal_that_others_could_have_written_is_none(image):
    journal = Journal.create(record())
    (path,) = journal.paths
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        assert Journal.load(path) is None
    path.chmod(0o644)
    assert Journal.load(path).record == journal.record


def test_a_journal_of_another_user_is_none(monkeypatch):
    (path,) = Journal.create(record()).paths
    me = os.geteuid()
    if me == 0:
        os.chown(path, 1234, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert Journal.load(path) is None
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid)
    assert Journal.load(path) is not None


def test_what_is_no_plain_file_is_no_journal(image, tmp_path):
    """A link leads elsewhere; opening a FIFO would wait for ever."""
    (path,) = Journal.create(record()).paths
    link = tmp_path / "link.journal"
    link.symlink_to(path)
    fifo = tmp_path / "fifo.journal"
    os.mkfifo(fifo)
    assert Journal.load(link) is None
    assert Journal.load(fifo) is None
    assert Journal.load(tmp_path) is None
    assert Journal.load(tmp_path / "nosuch") is None


def test_a_long_journal_is_read_to_a_limit(monkeypatch):
    journal = Journal.create(record())
    journal.add(made="x")
    monkeypatch.setattr(module, "_LIMIT", journal.paths[0].stat().st_size)
    journal.add(made="y")
    assert Journal.load(journal.paths[0]).entries == [{"made": "x"}]


# finding it


def test_both_places_are_one_journal(state, image):
    made = Journal.create(of_pivot(image), image)
    made.add(made="x")
    made.mark(pivoted=True)
    for named in ((), (str(image),), (str(image), str(image))):
        (found,) = journals(named)
        assert found.record == made.record
        assert found.paths == made.paths
        assert found.entries == [{"made": "x"}, {"pivoted": True}]
        assert found.complete
    # What goes on from here is written where the next one looks.
    found.mark(pivoted=False)
    (again,) = journals()
    assert not again.pivoted


def test_found_beside_the_image_alone(state, image):
    """On another host, or after the state directory was lost."""
    made = Journal.create(of_pivot(image), image)
    made.mark(pivoted=True)
    made.paths[0].unlink()
    assert list(journals()) == []
    (found,) = journals((str(image),))
    assert found.pivoted
    assert found.complete
    found.remove()
    assert list(image.parent.glob("*.journal")) == []


def test_without_the_one_beside_the_image_it_is_not_complete(image):
    made = Journal.create(of_pivot(image), image)
    made.mark(pivoted=True)
    beside(image).unlink()
    (found,) = journals((str(image),))
    assert not found.pivoted  # that word stood there alone
    assert not found.complete
    assert Journal.create(record(run="cafebabe")).complete  # what pivots nothing has no home


def test_a_forged_one_beside_the_image_does_not_speak_for_ours(image):
    """Same run, another record: it would have us start from, or remove, another file."""
    made = Journal.create(of_pivot(image))
    forged = Journal(of_pivot(image, files=("/etc/passwd",)), (beside(image),), [])
    beside(image).write_text(json.dumps(forged.record.as_json()) + '\n{"pivoted": true}\n')
    beside(image).chmod(0o600)
    (found,) = journals((str(image),))
    assert found.record == made.record
    assert found.paths == made.paths
    assert not found.pivoted


def test_other_images_and_other_files_are_left_out(image):
    other = image.with_name("disk.qcow2-old")
    other.write_bytes(b"")
    Journal.create(of_pivot(other), other).paths[0].unlink()
    beside(image, "cafebabe").write_text("garbage")
    assert list(journals((str(image),))) == []
    assert len(list(journals((str(other),)))) == 1
    assert list(journals((str(image.parent / "nosuch" / "image"),))) == []


# what entries say


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        ([], False),
        ([{"made": "x"}], False),
        ([{"pivoted": True}], True),
        ([{"pivoted": True}, {"pivoted": False}], False),
        ([{"pivoted": True}, {"pivoted": False}, {"pivoted": True}], True),
        ([{"pivoted": True}, {"made": "x"}], True),
        ([{"pivoted": 1}], False),
        ([{"pivoted": "true"}], False),
        ([{"pivoted": True}, {"pivoted": None}], False),
    ],
)
def test_the_last_word_on_the_pivot_counts(entries, verdict):
    assert pivoted(entries) is verdict


@given(st.lists(st.booleans(), min_size=1))
def test_the_last_word_on_the_pivot_counts_however_often_it_was_given(words_given):
    assert pivoted([{"pivoted": word} for word in words_given]) is words_given[-1]


def test_only_files_of_the_record_were_made():
    """A file that is in the record and was made anew is the last one."""
    entries = [
        {"made": "/i/t", "dev": 1, "ino": 2},
        {"made": "/etc/passwd", "dev": 1, "ino": 3},
        {"made": "/i/z", "dev": 1},
        {"made": "/i/z", "dev": "x", "ino": 1},
        {"made": ["/i/z"], "dev": 1, "ino": 1},
        {"made": "/i/z", "dev": None, "ino": 1},
        {"created": "/i/z"},
        {"made": "/i/t", "dev": 1, "ino": 4},
    ]
    journal = Journal(record(files=("/i/t", "/i/z")), (), entries)
    assert journal.made() == {"/i/t": (1, 4)}


def test_a_process_is_identified():
    data = VMIdentity("n", "u", 1, 2, "b", "m")
    assert Record.from_json(replace(record(), vm=data).as_json()).vm == data
    assert VM.pid == 0


def test_only_a_first_line_that_was_never_complete_is_discarded(image):
    """Its controller was killed while it wrote it; the next one must be able to write its own."""
    wanted = of_pivot(image)
    journal = Journal.create(wanted, image)
    discard_torn(wanted)
    assert all(path.exists() for path in journal.paths)
    for path in journal.paths:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(Error):
        Journal.create(wanted, image)
    discard_torn(wanted)
    assert not any(path.exists() for path in journal.paths)
    Journal.create(wanted, image).remove()
