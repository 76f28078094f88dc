"""What the lock of a backup says: what is believed of it, and whether the backup is made."""

import json
import os
from dataclasses import replace

import oldrecords
import pytest

from qmpblock.changes.backupnote import BackupNote, read_note
from qmpblock.errors import RecordError
from qmpblock.names import backup_lock_name
from qmpblock.qemu.lock import Holder
from qmpblock.versioned import plain

WHEN = "20261130T110500Z"
LOCK = backup_lock_name("0123abcd")
OLD = Holder.from_text(oldrecords.BACKUP_LOCK)


def said(**changed):
    """Return the holder of such a lock, which says something else than the old one."""
    return replace(OLD, details={**OLD.details, **changed})


def test_what_an_older_version_wrote():
    note = read_note(OLD, LOCK)
    assert (note.directory, note.device, note.inode, note.point) == ("/b", 1, 2, f"{WHEN}.json")
    assert note.made[1] == ("d0", "qmpblock-backup-0123abcd-89efcdab-0-end")
    assert note.before[0] == ("d0", "qmpblock-backup-0123abcd-00000001-0")
    assert note.nodes == ("qmpblock-deadbeef-to-0-left",)
    assert json.loads(json.dumps(plain(note))) == OLD.details


def test_what_a_newer_version_adds_is_kept():
    assert read_note(said(later=1), LOCK).more == {"later": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"made": [["d0", "bitmap0"]]},
        {"before": [["d0", "bitmap0"]]},
        {"before": [["d0", "qmpblock-backup-ffffffff-00000001-0"]]},  # of another directory
        {"nodes": ["d0"]},
        {"nodes": ["qmpblock-0badcafe-to-0-left"]},  # of another run
        {"point": "x.json"},
        {"point": f"../{WHEN}.json"},
        {"point": f"{WHEN}.begun"},
        {"directory": None},
        {"made": 1},
    ],
)
def test_what_is_not_a_backups_is_not_touched(changed):
    """Whoever is in that QEMU may have written it."""
    with pytest.raises(RecordError, match=LOCK):
        read_note(said(**changed), LOCK)


def note_of(directory):
    status = os.stat(directory)
    place = str(directory)
    return BackupNote(place, status.st_dev, status.st_ino, f"{WHEN}.json", (), (), ())


def test_whether_it_is_made(tmp_path):
    note = note_of(tmp_path)
    assert note.is_made() is False
    (tmp_path / f"{WHEN}.json.partial").touch()
    assert note.is_made() is False
    (tmp_path / f"{WHEN}.json").touch()
    assert note.is_made() is True


def test_where_that_cannot_be_told(tmp_path):
    """The directory is gone, or another one is there in its place."""
    there = tmp_path / "b"
    there.mkdir()
    note = note_of(there)
    there.rename(tmp_path / "c")
    assert note.is_made() is None
    there.mkdir()
    (there / f"{WHEN}.json").touch()
    assert note.is_made() is None
    there.joinpath(f"{WHEN}.json").unlink()
    there.rmdir()
    there.touch()
    assert note.is_made() is None
