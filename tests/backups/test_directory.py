"""A directory of backups: the step by which one is made, what is left by whoever was killed."""

import fcntl
import json
import os
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import oldrecords
import pytest
from backuppoints import BACKUPS, disk, point

from qmpblock.backups.directory import foresee_backups, open_backups, read_points
from qmpblock.backups.point import find_point
from qmpblock.errors import BusyError, Error, RecordError, RequestError
from qmpblock.names import BACKUP_LOCK_FILE

WHEN = "20261130T110500Z"
IMAGE = f"{WHEN}-vd0.qcow2"
POINT = point(WHEN, [disk("vd0", IMAGE)])


def names(path):
    return sorted(one.name for one in path.iterdir())


def test_a_backup_is_made_in_one_step(tmp_path):
    with open_backups(tmp_path) as backups:
        backups.begin(WHEN, BACKUPS, [IMAGE])
        (tmp_path / IMAGE).write_bytes(b"x")
        assert read_points(tmp_path) == ()
        backups.make(POINT)
        assert read_points(tmp_path) == (POINT,)
        backups.end(WHEN)
    assert names(tmp_path) == [IMAGE, f"{WHEN}.json"]
    assert json.loads((tmp_path / f"{WHEN}.json").read_text())["format"] == 1


def test_what_was_broken_off_goes(tmp_path):
    (tmp_path / "20261130T110400Z-vd0.qcow2").touch()  # which no such file lists
    with open_backups(tmp_path) as backups:
        backups.begin(WHEN, BACKUPS, [IMAGE, f"{WHEN}-vd1.qcow2"])
        (tmp_path / IMAGE).touch()
        (tmp_path / f"{WHEN}-vd1.qcow2.partial").touch()
        (tmp_path / f"{WHEN}.json.partial").touch()
        backups.sweep(but="")
    assert names(tmp_path) == ["20261130T110400Z-vd0.qcow2"]


def test_the_first_one_that_was_broken_off_has_given_the_directory_its_id(tmp_path):
    """By which what it left in the VM is called."""
    with open_backups(tmp_path) as backups:
        assert backups.id == ""
        backups.begin(WHEN, BACKUPS, [IMAGE])
        (tmp_path / f"{IMAGE}.partial").touch()
        backups.check_new()  # it holds nothing else
        assert backups.id == BACKUPS
        backups.begin("20261130T120500Z", BACKUPS, [])
        backups.sweep(but="20261130T120500Z")
        assert backups.id == BACKUPS
    assert names(tmp_path) == ["20261130T120500Z.begun"]


def test_what_was_made_stays(tmp_path):
    with open_backups(tmp_path) as backups:
        backups.begin(WHEN, BACKUPS, [IMAGE])
        (tmp_path / IMAGE).touch()
        backups.make(POINT)
        backups.sweep(but="")
    assert names(tmp_path) == [IMAGE, f"{WHEN}.json"]


def test_what_is_listed_by_mistake_stays(tmp_path):
    """No directory; and what a backup tells of that is made."""
    other = point(f"{WHEN}-2", [disk("vd0", f"{WHEN}-2-vd0.qcow2")])
    (tmp_path / f"{WHEN}-d").mkdir()
    (tmp_path / f"{WHEN}-2-vd0.qcow2").touch()
    with open_backups(tmp_path) as backups:
        backups.make(other)
        backups.begin(WHEN, BACKUPS, [f"{WHEN}-d", f"{WHEN}-2-vd0.qcow2"])
        backups.sweep(but="")
    assert names(tmp_path) == [f"{WHEN}-2-vd0.qcow2", f"{WHEN}-2.json", f"{WHEN}-d"]


@pytest.mark.parametrize(
    "listed", ["other.qcow2", "../x", f"{WHEN}-../../x", f"{WHEN}-{'a' * 200}", ""]
)
def test_what_only_malice_lists(listed, tmp_path):
    """Then nothing goes at all."""
    place = tmp_path / "b"
    place.mkdir()
    for one in (place / "other.qcow2", tmp_path / "x"):
        one.touch()
    (place / f"{WHEN}.begun").write_text(json.dumps({"backups": BACKUPS, "images": [listed]}))
    with (
        open_backups(place) as backups,
        pytest.raises(RecordError, match=f"{WHEN}.begun cannot be read") as caught,
    ):
        backups.sweep(but="")
    assert caught.value.path == place / f"{WHEN}.begun"
    assert names(place) == [f"{WHEN}.begun", "other.qcow2"]
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": 99, "images": []}',
        '{"backups": "0123abcd", "images": [1]}',
        '{"backups": "../x", "images": []}',
    ],
)
def test_what_cannot_be_read_is_not_removed(text, tmp_path):
    (tmp_path / f"{WHEN}.begun").write_text(text)
    with open_backups(tmp_path) as backups, pytest.raises(RecordError, match="cannot be read"):
        backups.sweep(but="")
    assert names(tmp_path) == [f"{WHEN}.begun"]


@pytest.mark.parametrize("text", ["", "{", "null", '{"format": 99}', "[" * 10_000])
def test_a_point_that_cannot_be_read(text, tmp_path):
    (tmp_path / f"{WHEN}.json").write_text(text)
    with pytest.raises(RecordError, match=f"{WHEN}.json cannot be read"):
        read_points(tmp_path)


def test_what_older_versions_wrote(tmp_path):
    (tmp_path / f"{WHEN}.json").write_text(oldrecords.BACKUP_POINT)
    [read] = read_points(tmp_path)
    wanted = replace(disk("vd0", IMAGE), bitmap="qmpblock-backup-0123abcd-89efcdab-0")
    assert read == replace(POINT, id="89efcdab", disks=(wanted,))
    (tmp_path / f"{WHEN}.json").unlink()
    (tmp_path / f"{WHEN}.begun").write_text(oldrecords.BACKUP_BEGUN)
    (tmp_path / IMAGE).touch()
    with open_backups(tmp_path) as backups:
        assert backups.id == BACKUPS
        backups.sweep(but="")
    assert names(tmp_path) == []


def test_one_of_a_newer_version_says_so(tmp_path):
    document = json.loads(oldrecords.BACKUP_POINT) | {"format": 2, "version": "9.0"}
    (tmp_path / f"{WHEN}.json").write_text(json.dumps(document))
    with pytest.raises(RecordError) as caught:
        read_points(tmp_path)
    assert str(tmp_path / f"{WHEN}.json") in caught.value.message
    assert "of format 2, written by qmpblock 9.0" in caught.value.message
    assert "newer one" in caught.value.remedy


def test_a_link_is_no_point(tmp_path):
    (tmp_path / "x").write_text(json.dumps(POINT.as_json()))
    (tmp_path / f"{WHEN}.json").symlink_to("x")
    (tmp_path / "y.json").mkdir()
    os.mkfifo(tmp_path / "z.json")
    with pytest.raises(RecordError):
        read_points(tmp_path)


class _DeadError(BaseException):
    """Whoever did it is gone: it catches nothing, and does nothing more."""


@contextmanager
def dying_after(count, monkeypatch):
    """Be gone before call number `count` that does anything to a file; yield whom that befell."""
    left, died = count, []

    def dying(real):
        def called(*words, **more):
            nonlocal left
            left -= 1
            if left < 0:
                died.append(real)
                raise _DeadError
            return real(*words, **more)

        return called

    with monkeypatch.context() as patched:
        for name in ("open", "link", "rename", "unlink", "fsync", "write", "ftruncate"):
            patched.setattr(os, name, dying(getattr(os, name)))
        with suppress(_DeadError):
            yield died


@pytest.mark.parametrize("first", [True, False])
def test_whoever_is_killed_at_any_step(first, tmp_path, monkeypatch):
    """The backup is made or it is not; the next one says which, and leaves no other trace."""
    before = point("20261130T100500Z", [disk("vd0", "20261130T100500Z-vd0.qcow2")])
    made, number = set(), 0
    while True:
        place = tmp_path / str(number)
        place.mkdir()
        with open_backups(place) as backups:
            if not first:
                backups.make(before)
        there = names(place)

        with (
            dying_after(number, monkeypatch) as died,
            open_backups(place) as backups,
            backups.locked(),
        ):
            backups.read()
            backups.begin(WHEN, BACKUPS, [IMAGE])
            (place / f"{IMAGE}.partial").touch()
            (place / f"{IMAGE}.partial").rename(place / IMAGE)
            backups.make(POINT)
            backups.end(WHEN)
        with open_backups(place) as backups, backups.locked():
            backups.read()
            backups.check_one()
            backups.check_new()
            assert backups.id in ("", BACKUPS)
            backups.begin("20261130T120500Z", BACKUPS, [])
            backups.sweep(but="20261130T120500Z")
            backups.end("20261130T120500Z")
            made.add(WHEN in [one.when for one in backups.points])
        new = [IMAGE, f"{WHEN}.json"] if WHEN in [one.when for one in backups.points] else []
        assert names(place) == sorted({*there, *new, ".qmpblock-backup.lock"})
        if not died:
            break
        number += 1
    assert number > 20
    assert made == {True, False}


def test_it_is_not_certain_that_it_is_made(tmp_path, monkeypatch):
    """Then it is not."""
    with open_backups(tmp_path) as backups:
        backups.begin(WHEN, BACKUPS, [IMAGE])
        (tmp_path / IMAGE).touch()
        with monkeypatch.context() as patched:
            patched.setattr(backups.files, "sync", lambda: os.listdir(tmp_path / "none"))
            with pytest.raises(Error, match=f"cannot write .*{WHEN}.json"):
                backups.make(POINT)
        backups.end(WHEN)
        assert backups.points == []
    assert names(tmp_path) == []


def test_who_has_the_lock_has_the_file_that_is_there(tmp_path, monkeypatch):
    """Not one that somebody removed between opening and locking it."""
    lock, calls = fcntl.flock, []

    def late(fd, how):
        if not calls:
            (tmp_path / BACKUP_LOCK_FILE).unlink()
        calls.append(fd)
        lock(fd, how)

    with open_backups(tmp_path) as one, open_backups(tmp_path) as other:
        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", late)
            held = one.locked()
            held.__enter__()
        with pytest.raises(BusyError), other.locked():
            pass
        held.__exit__(None, None, None)
    assert len(calls) == 2


def test_a_directory_that_was_made_in_vain(tmp_path):
    """It goes again, but not from under anybody who is at work in it."""
    place = tmp_path / "b"
    with open_backups(place, make=True), open_backups(place) as other, other.locked():
        pass
    assert not place.exists()
    with ExitStack() as stack:
        with open_backups(place, make=True):
            stack.enter_context(stack.enter_context(open_backups(place)).locked())
        assert names(place) == [BACKUP_LOCK_FILE]


def test_a_refused_directory_holds_nothing_of_ours(tmp_path):
    """Neither one of other things, nor one that was empty."""
    with pytest.raises(RequestError, match="no name"), open_backups("", make=True):
        pass
    with open_backups(tmp_path, make=True) as backups, suppress(BusyError), backups.locked():
        raise BusyError("of whatever reason")
    assert names(tmp_path) == []
    (tmp_path / "holiday.jpg").touch()
    refused = pytest.raises(RequestError, match=r"such as holiday\.jpg")
    with refused as caught, open_backups(tmp_path, make=True):
        pass
    assert caught.value.standing == "nothing was touched"
    assert names(tmp_path) == ["holiday.jpg"]
    with open_backups(tmp_path) as other, other.locked(), open_backups(tmp_path, make=True):
        pass  # somebody is at work there, and says what is wrong
    place = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(RequestError, match="not UTF-8"), open_backups(place, make=True):
        pass
    assert not place.exists()


def test_their_order_is_that_of_their_instants(tmp_path):
    later = replace(point("20261130T110600Z", [disk("vd0", "20261130T110600Z-vd0.qcow2")]))
    with open_backups(tmp_path) as backups:
        for one in (later, POINT):
            backups.make(one)
    assert read_points(tmp_path) == (POINT, later)


def test_their_order_is_that_in_which_they_were_made(tmp_path):
    """A clock that was wrong has been set back."""
    ahead = replace(point("20330101T000000Z", [disk("vd0", "20330101T000000Z-vd0.qcow2")]))
    with open_backups(tmp_path) as backups:
        made = []
        for one in (ahead, POINT):
            made.append(replace(one, number=backups.next_number))
            backups.make(made[-1])
            backups.read()
    assert [one.number for one in made] == [1, 2]
    assert read_points(tmp_path) == tuple(made)
    assert find_point(made, None) == made[-1]
    assert find_point(made, "2026-12-31") == made[-1]


def test_one_at_a_time(tmp_path):
    with open_backups(tmp_path) as one, open_backups(tmp_path) as other:
        twice = pytest.raises(BusyError, match=f"by process {os.getpid()} on")
        with one.locked(), twice, other.locked():
            pass
        with other.locked():
            pass


def test_a_directory_of_other_things(tmp_path):
    (tmp_path / "lost+found").mkdir()
    with open_backups(tmp_path) as backups:
        with backups.locked():
            backups.check_new()
        (tmp_path / "holiday.jpg").touch()
        with pytest.raises(RequestError, match=r"but other things, such as holiday\.jpg"):
            backups.check_new()


def test_directories_that_were_put_together(tmp_path):
    other = replace(point("20261130T110600Z", [disk("vd0", "c.qcow2")]), backups="ffffffff")
    with open_backups(tmp_path) as backups:
        backups.make(POINT)
        backups.make(other)
        backups.read()
        with pytest.raises(RequestError, match="more than one directory"):
            backups.check_one()


def test_a_directory_that_is_made(tmp_path):
    with (
        pytest.raises(RequestError, match="cannot open the directory"),
        open_backups(tmp_path / "b"),
    ):
        pass
    with open_backups(tmp_path / "b", make=True) as backups, backups.locked():
        pass
    assert names(tmp_path) == []  # no backup was made
    with open_backups(tmp_path / "b", make=True) as backups:
        backups.make(POINT)
    assert names(tmp_path / "b") == [f"{WHEN}.json"]


def test_a_directory_that_is_foreseen(tmp_path):
    """As it would be if it were made now; it is not."""
    with foresee_backups(tmp_path / "b") as backups:
        backups.check_free()
        assert (backups.read(), backups.points, backups.id) == ({}, [], "")
        backups.check_new()  # whatever lies beside it
        backups.check_begin(WHEN)
        assert (backups.path, backups.home) == (str(tmp_path / "b"), str(tmp_path))
        assert backups.place(IMAGE) == str(tmp_path / "b" / IMAGE)
    assert names(tmp_path) == []
    with foresee_backups(tmp_path) as backups:
        assert backups.home == backups.path == str(tmp_path)
        backups.check_begin(WHEN)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["no/b", "file", "file/b", "link", "x" * 300, "nul\0"])
def test_what_cannot_be_made_is_foreseen(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = names(tmp_path)
    said = []
    for opened in (foresee_backups(tmp_path / name), open_backups(tmp_path / name, make=True)):
        with pytest.raises(RequestError) as refused, opened:
            pass
        said.append(str(refused.value))
        assert names(tmp_path) == before
    assert said[0] == said[1]


def test_what_could_not_be_begun_is_foreseen(tmp_path, monkeypatch):
    with open_backups(tmp_path) as backups:
        (tmp_path / f"{WHEN}.begun").write_text("{}")
        with pytest.raises(RecordError):
            backups.check_begin("20261130T120500Z")
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
        with pytest.raises(Error, match=r"cannot write .*Z\.begun: Permission denied"):
            backups.check_begin("20261130T120500Z")
    with (
        pytest.raises(RequestError, match=r"cannot open the directory .*: Permission denied"),
        foresee_backups(tmp_path / "b"),
    ):
        pass
