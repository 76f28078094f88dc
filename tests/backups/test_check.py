"""Testing a directory while somebody is at work in it: what is being made is no damage."""

import os
from contextlib import contextmanager

import pytest
from backuppoints import BACKUPS, disk, point

from qmpblock.backups import check
from qmpblock.backups.check import check_backups
from qmpblock.backups.directory import open_backups
from qmpblock.cli.backupsoutput import said_checked
from qmpblock.names import BACKUP_LOCK_FILE

OLD = point("20261130T110500Z", [disk("vd0", "20261130T110500Z-vd0.qcow2")])
WHEN = "20261130T120500Z"
NEW = point(WHEN, [disk("vd0", f"{WHEN}-vd0.qcow2")])
ME = f"process {os.getpid()} on {os.uname().nodename}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Give a directory that has a backup whose image is whole."""

    async def none(*_):
        return None

    monkeypatch.setattr(check, "_fault", none)
    with open_backups(tmp_path) as backups:
        backups.make(OLD)
    (tmp_path / OLD.disks[0].file).touch()
    return tmp_path


@contextmanager
def being_made(place):
    """Have another backup be made, as far as its images."""
    with open_backups(place) as backups, backups.locked():
        backups.read()
        backups.begin(WHEN, BACKUPS, [NEW.disks[0].file])
        (place / f"{NEW.disks[0].file}.partial").touch()
        yield backups


async def test_it_is_named_and_counts_for_nothing(place):
    with being_made(place):
        found = await check_backups(place)
    assert (found.whole, found.others) == (True, ())
    assert [one.when for one in found.points] == [OLD.when]
    assert (found.underway.when, found.underway.by) == (WHEN, ME)
    assert found.underway.files == (f"{WHEN}-vd0.qcow2.partial", f"{WHEN}.begun")
    lines = list(said_checked(found))
    assert lines[:2] == [
        f"{OLD.when}: whole",
        f"{WHEN}: being made, by {ME}; it is none yet",
    ]
    assert "1 of 1 backups are whole" in lines[2]


async def test_one_that_has_only_just_begun(place):
    with open_backups(place) as backups, backups.locked():
        found = await check_backups(place)
        assert (found.underway.when, found.underway.files) == ("", ())
        (place / BACKUP_LOCK_FILE).write_text("")
        found = await check_backups(place)
    said = f"a backup: being made, by {found.underway.by}; it is none yet"
    assert said in list(said_checked(found))


async def test_one_that_is_made_and_has_not_ended(place):
    with being_made(place) as backups:
        (place / NEW.disks[0].file).touch()
        backups.make(NEW)
        found = await check_backups(place)
        assert (found.whole, found.underway) == (True, None)
        assert len(found.points) == 2


@pytest.mark.parametrize("ends", ["made", "broken off", "begun"])
async def test_one_that_comes_to_its_end_meanwhile(ends, place, monkeypatch):
    """Or begins, and is made, while the others are read."""

    async def meanwhile(*_):
        if ends == "begun":
            making.__enter__()
        (place / f"{NEW.disks[0].file}.partial").rename(place / NEW.disks[0].file)
        if ends != "broken off":
            backups = making.gen.gi_frame.f_locals["backups"]
            backups.make(NEW)
            backups.end(WHEN)
        making.__exit__(None, None, None)

    monkeypatch.setattr(check, "_fault", meanwhile)
    making = being_made(place)
    if ends != "begun":
        making.__enter__()
    found = await check_backups(place)
    assert (found.whole, found.others, found.underway) == (True, (), None)
    assert [one.when for one in found.points] == [OLD.when]


async def test_what_one_left_that_died_is_nobodys(place):
    with being_made(place):
        pass
    found = await check_backups(place)
    assert (found.whole, found.underway) == (True, None)
    assert set(found.others) == {f"{WHEN}-vd0.qcow2.partial", f"{WHEN}.begun"}


async def test_what_cannot_be_read_of_it(place):
    with being_made(place):
        (place / f"{WHEN}.begun").write_text("{}")
        found = await check_backups(place)
    assert found.whole
    assert (found.underway.when, found.underway.files) == ("", ())


async def test_of_no_backup_nothing_is_whole(tmp_path):
    """A directory that was not mounted, say."""
    found = await check_backups(tmp_path)
    assert (found.points, found.unread, found.whole) == ((), (), False)
