"""Who makes a backup in a directory; whoever only looks is in nobody's way, and leaves nothing."""

import fcntl
import os
import threading
from contextlib import contextmanager

import pytest

from qmpblock.backups import maker
from qmpblock.backups.maker import check_free, locked, unwritable
from qmpblock.errors import BusyError, Error
from qmpblock.host.ourfiles import Directory
from qmpblock.names import BACKUP_LOCK_FILE


@pytest.fixture
def files(tmp_path):
    with Directory(tmp_path) as opened:
        yield opened


def said(look, path, files):
    """Return what is refused, and how."""
    with pytest.raises(Error) as refused:
        look(path, files)
    return type(refused.value), str(refused.value)


def have(path, files):
    with locked(path, files):
        pass


@contextmanager
def unchanged(tmp_path):
    def seen():
        paths = [tmp_path, *sorted(tmp_path.iterdir())]
        return [(one, one.lstat().st_mtime_ns, one.lstat().st_size) for one in paths]

    before = seen()
    yield
    assert seen() == before


def test_nothing_is_left_by_a_look(tmp_path, files):
    with unchanged(tmp_path):
        check_free("/b", files)
    have("/b", files)
    with unchanged(tmp_path):
        check_free("/b", files)
    with locked("/b", files):
        pass


def test_it_refuses_as_whoever_would_make_one(tmp_path, files):
    with locked("/b", files), unchanged(tmp_path):
        found = said(check_free, "/b", files)
        assert found == said(have, "/b", files)
        assert found[0] is BusyError
    lock = tmp_path / BACKUP_LOCK_FILE
    lock.unlink()
    for spoil in (lock.mkdir, lambda: lock.symlink_to("elsewhere")):
        spoil()
        with unchanged(tmp_path):
            assert said(check_free, "/b", files) == said(have, "/b", files)
        lock.rmdir() if lock.is_dir() else lock.unlink()


def test_who_it_is(tmp_path, files):
    assert maker.maker(files) is None
    with locked("/b", files):
        said = f"process {os.getpid()} on {os.uname().nodename}"
        with unchanged(tmp_path):
            assert maker.maker(files) == said
        (tmp_path / BACKUP_LOCK_FILE).write_bytes(b"")
        assert "not said yet" in maker.maker(files)
    assert maker.maker(files) is None
    (tmp_path / BACKUP_LOCK_FILE).unlink()
    os.mkfifo(tmp_path / BACKUP_LOCK_FILE)
    assert maker.maker(files) is None  # nor does it wait for the other end


def test_where_there_are_no_locks(files, monkeypatch):
    have("/b", files)

    def none(_fd, _how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    found = said(check_free, "/b", files)
    assert found == said(have, "/b", files)
    assert "knows no locks" in found[1]
    assert maker.maker(files) is None


def test_whoever_looks_is_waited_for(files):
    """For an instant he has the lock, too."""
    have("/b", files)
    fd = os.open(BACKUP_LOCK_FILE, os.O_RDWR, dir_fd=files.fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        timer = threading.Timer(maker._LOOK * 1.5, fcntl.flock, (fd, fcntl.LOCK_UN))
        timer.start()
        with locked("/b", files):
            pass
        timer.join()
    finally:
        os.close(fd)


def test_a_directory_that_cannot_be_written(files, monkeypatch):
    assert unwritable(files) is None
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert unwritable(files) == "Permission denied"
    kind, words = said(check_free, "/b", files)
    assert (kind, words.splitlines()[0]) == (
        Error,
        f"cannot make /b/{BACKUP_LOCK_FILE}: Permission denied",
    )
