"""A file of figures: whole at every moment, or what was there before."""

import os
import stat

import pytest

from qmpblock.errors import Error
from qmpblock.metrics.textfile import remove, replace


def test_it_is_replaced_and_removed(tmp_path):
    path = tmp_path / "f.prom"
    replace(str(path), "one\n")
    before = path.stat().st_ino
    with path.open() as reader:
        replace(str(path), "two\n")
        assert reader.read() == "one\n"
    assert path.read_text() == "two\n"
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~os.umask(os.umask(0o022))
    assert [one.name for one in tmp_path.iterdir()] == ["f.prom"]
    remove(str(path))
    remove(str(path))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "f.prom"
    replace(str(path), "one\n")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "f.prom.partial").symlink_to(elsewhere)  # somebody else's
    with pytest.raises(Error, match="cannot write"):
        replace(str(path), "two\n")
    assert path.read_text() == "one\n"
    assert not elsewhere.exists()
    with pytest.raises(Error, match="No such file or directory"):
        replace(str(tmp_path / "none" / "f.prom"), "two\n")
    with pytest.raises(Error, match="cannot remove"):
        remove(str(tmp_path))
