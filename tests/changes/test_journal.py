"""The journal: what is read is what was written, and only if we wrote it."""

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from drawing import RUN, VM, record
from hypothesis import given
from hypothesis import strategies as st
from journaling import Full, beside, of_pivot

from qmpblock import __version__
from qmpblock.changes import journal as journals
from qmpblock.changes import journalfile as module
from qmpblock.changes.journal import FORMAT, Journal, discard_torn, state_directory
from qmpblock.changes.record import pivoted
from qmpblock.errors import Error, NoRoomError, RecordError


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
        said = json.loads(path.read_text())
        assert (said["format"], said["version"]) == (FORMAT, __version__)
        assert Journal.load(path).record == journal.record


def test_nothing_of_one_that_was_removed_stays_open(state, image):
    """Who unmounts a file system after a copy need not wait for Python to collect its objects."""

    def opened():
        return {
            path
            for one in Path("/proc/self/fd").iterdir()
            if (path := os.path.realpath(one)).startswith(str(state.parent))
        }

    journal = Journal.create(of_pivot(image), image)
    assert len(opened()) == 4, "two files, and the directories they lie in"
    journal.remove()
    assert opened() == set()
    journal.remove()
    with pytest.raises(Error, match="No such file"):
        journal.add(pivoted=True)


@pytest.mark.parametrize("place", ["{}", "{}/one/other", "/proc/nothing/state"])
def test_a_directory_that_cannot_be_made(place, state, monkeypatch):
    state.write_text("a file")
    where = place.format(state)
    monkeypatch.setenv("QMPBLOCK_STATE", where)
    with pytest.raises(Error, match=f"cannot write the journal {where}: No") as caught:
        Journal.create(record())
    assert caught.value.standing == "nothing was changed"
    assert "QMPBLOCK_STATE" in caught.value.remedy


def test_no_room_beside_the_image_leaves_none_at_all(state, tmp_path):
    gone = tmp_path / "gone" / "disk.qcow2"
    with pytest.raises(Error, match="gone") as caught:
        Journal.create(of_pivot(gone), gone)
    assert "directory of the image" in caught.value.remedy
    assert list(state.glob("*.journal")) == []


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
    assert list(state.glob("*.journal")) == []


# what is written, and when it is stable


class Disk:
    """Notes what is written and made stable, in order, by path."""

    def __init__(self, monkeypatch):
        self.seen = []
        write, fsync = os.pwrite, os.fsync
        self.fail = {}

        def path(fd):
            return Path(os.readlink(f"/proc/self/fd/{fd}")).name

        def noting_write(fd, data, position):
            self.seen.append(("write", path(fd)))
            if "write" in self.fail:
                write(fd, data[: len(data) // 2], position)
                raise OSError(self.fail["write"], os.strerror(self.fail["write"]))
            return write(fd, data, position)

        def noting_fsync(fd):
            self.seen.append(("fsync", path(fd)))
            if "fsync" in self.fail:
                raise OSError(self.fail["fsync"], os.strerror(self.fail["fsync"]))
            fsync(fd)

        monkeypatch.setattr(os, "pwrite", noting_write)
        monkeypatch.setattr(os, "fsync", noting_fsync)


def test_each_file_is_stable_before_its_name_and_before_the_call_returns(image, monkeypatch):
    Journal.create(of_pivot(image), image).remove()  # the key is made once
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
    for path in journal.paths:
        assert [what for what, name in disk.seen if name == path.name] == ["write", "fsync"]
    assert len(disk.seen) == 4


def test_what_the_guest_waits_for_costs_the_slower_of_two_fsyncs(image, monkeypatch):
    """Each begins before the other one ends."""
    journal = Journal.create(of_pivot(image), image)
    both, fsync = threading.Barrier(2, timeout=120), os.fsync

    def meeting(fd):
        both.wait()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", meeting)
    journal.mark(pivoted=True)
    assert journal.pivoted
    for path in journal.paths:
        assert Journal.load(path).pivoted


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


# no room


def test_no_room_anywhere(state, image, monkeypatch):
    with Full(monkeypatch, state, image.parent):
        for wanted, place in ((of_pivot(image), image), (record(), None)):
            with pytest.raises(NoRoomError, match="no room") as caught:
                Journal.create(wanted, place)
            assert caught.value.standing == "nothing was changed"
            assert "QMPBLOCK_STATE" in caught.value.remedy
    assert list(state.glob("*.journal")) == []
    assert list(image.parent.glob("*qmpblock*")) == []


def test_what_is_needed_later_has_its_blocks_already(image):
    """So a mark takes none, and the guest does not wait for an allocation either."""
    journal = Journal.create(of_pivot(image), image)
    for path in journal.paths:
        status = path.stat()
        if status.st_blocks * 512 < status.st_size:
            pytest.skip("this file system does not say what it gives")
        assert status.st_blocks * 512 >= status.st_size + module._SPARE
    journal.restart()
    assert journal.paths[0].stat().st_blocks * 512 >= status.st_size + module._SPARE


def test_a_file_system_that_cannot_reserve(image, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(module, "keep_size", cannot)
    journal = Journal.create(of_pivot(image), image)
    assert len(journal.paths) == 2
    journal.mark(pivoted=True)


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


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_journal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "arbitrary.journal"
    path.write_bytes(data)
    try:
        assert Journal.load(path) is None
    except RecordError:
        return
    assert not data.strip(b"{") or data.startswith(b"{")  # it may have been torn as it began


@pytest.mark.parametrize("data", [b"\0" * 40, b"half a", b'{"run": \0\0', b"\n", b"{}\n", b"[]\n"])
def test_damage_is_no_first_line_that_was_torn(image, data):
    (path,) = Journal.create(record()).paths
    path.write_bytes(data)
    with pytest.raises(RecordError, match="cannot be read"):
        Journal.load(path)
    discard_torn(VM, RUN)
    assert path.read_bytes() == data


# another version's


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
    for one in (module, journals):
        monkeypatch.setattr(one, "LIMIT", journal.paths[0].stat().st_size)
    assert Journal.load(journal.paths[0]).entries == [{"made": "x"}]
    journal.add(made="y")
    with pytest.raises(RecordError, match="longer than any of ours"):  # not read in part
        Journal.load(journal.paths[0])


# finding it


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


def test_only_a_first_line_that_was_never_complete_is_discarded(image):
    """Its controller was killed while it wrote it; the next one must be able to write its own."""
    wanted = of_pivot(image)
    journal = Journal.create(wanted, image)
    discard_torn(VM, RUN)
    assert all(path.exists() for path in journal.paths)
    for path in journal.paths:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(Error):
        Journal.create(wanted, image)
    discard_torn(replace(VM, pid=1), RUN)  # of another process
    discard_torn(VM, "cafebabe")
    assert all(path.exists() for path in journal.paths)
    discard_torn(VM, RUN)
    # Beside the image there is no proof of who wrote half a line.
    assert [path.exists() for path in journal.paths] == [False, True]
