"""A file of figures: whole at every moment, or what was there before."""

import errno
import os
import stat
from pathlib import Path

import pytest

from qmpblock.errors import Error, RequestError
from qmpblock.metrics.textfile import check, remove, replace

ONE, TWO = (f"# HELP qmpblock_{name} Whether.\n" for name in ("one", "two"))


def test_it_is_replaced_and_removed(tmp_path):
    path = tmp_path / "f.prom"
    replace(str(path), ONE)
    before = path.stat().st_ino
    with path.open() as reader:
        replace(str(path), TWO)
        assert reader.read() == ONE
    assert path.read_text() == TWO
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~os.umask(os.umask(0o022))
    assert [one.name for one in tmp_path.iterdir()] == ["f.prom"]
    remove(str(path))
    remove(str(path))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "f.prom"
    replace(str(path), ONE)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "f.prom.partial").symlink_to(elsewhere)  # somebody else's
    with pytest.raises(Error, match="cannot write"):
        replace(str(path), TWO)
    assert path.read_text() == ONE
    assert not elsewhere.exists()
    with pytest.raises(Error, match="No such file or directory"):
        replace(str(tmp_path / "none" / "f.prom"), TWO)
    with pytest.raises(Error, match="cannot remove"):
        remove(str(tmp_path))


@pytest.mark.parametrize("named", ["disk.raw", "disk.raw.partial"])
def test_what_holds_anything_else_is_neither_written_over_nor_removed(named, tmp_path):
    """A disk image that was named by mistake, or a copy of it that is under way."""
    image = tmp_path / named
    image.write_bytes(b"precious")
    path = str(tmp_path / "disk.raw")
    with pytest.raises(Error, match="it exists, and holds something else"):
        replace(path, TWO)
    if named == "disk.raw":
        with pytest.raises(RequestError, match="it exists, and holds something else"):
            check(path)
        with pytest.raises(Error, match="it exists, and holds something else"):
            remove(path)
    assert image.read_bytes() == b"precious"
    assert [one.name for one in tmp_path.iterdir()] == [named]


def test_what_was_begun_is_removed_where_it_cannot_be_ended(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "f.prom"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(Error, match="No space left"):
            replace(str(path), TWO)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_file_keeps_its_name(tmp_path):
    path = tmp_path / "device"
    os.mkfifo(path)
    for refused in (lambda: check(str(path)), lambda: replace(str(path), ONE)):
        with pytest.raises(Error, match="it exists, and is no plain file"):
            refused()
    with pytest.raises(Error, match="cannot remove"):
        remove(str(path))
    assert path.is_fifo()
    assert [one.name for one in tmp_path.iterdir()] == ["device"]
