"""A directory of backups: the step by which one is made, what is left by whoever was killed."""

import json
import os
from dataclasses import replace

import pytest
from backuppoints import BACKUPS, disk, point

from qmpblock.backups.directory import open_backups, read_points
from qmpblock.errors import BusyError, RecordError, RequestError

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


@pytest.mark.parametrize("listed", ["other.qcow2", "../x", f"{WHEN}-../../x", f"{WHEN}-d"])
def test_what_is_listed_by_mistake_stays(listed, tmp_path):
    """Or by malice: nothing of another name, nothing elsewhere, no directory."""
    place = tmp_path / "b"
    place.mkdir()
    for one in (place / "other.qcow2", tmp_path / "x"):
        one.touch()
    (place / f"{WHEN}-d").mkdir()
    (place / f"{WHEN}.begun").write_text(json.dumps({"backups": BACKUPS, "images": [listed]}))
    with open_backups(place) as backups:
        backups.sweep(but="")
    assert names(place) == [f"{WHEN}-d", "other.qcow2"]
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 99, "images": []}', '{"backups": "a", "images": [1]}']
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


def test_a_link_is_no_point(tmp_path):
    (tmp_path / "x").write_text(json.dumps(POINT.as_json()))
    (tmp_path / f"{WHEN}.json").symlink_to("x")
    (tmp_path / "y.json").mkdir()
    os.mkfifo(tmp_path / "z.json")
    with pytest.raises(RecordError):
        read_points(tmp_path)


def test_their_order_is_that_of_their_instants(tmp_path):
    later = replace(point("20261130T110600Z", [disk("vd0", "20261130T110600Z-vd0.qcow2")]))
    with open_backups(tmp_path) as backups:
        for one in (later, POINT):
            backups.make(one)
    assert read_points(tmp_path) == (POINT, later)


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
