"""Blocks for a file, and no byte of it touched."""

import errno

import pytest

from qmpblock.host.fallocate import keep_size


def test_it_reserves_past_the_end_and_changes_no_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        keep_size(file.fileno(), 0, 1 << 16)
    assert path.read_bytes() == b"x"
    assert path.stat().st_blocks * 512 >= 1 << 16


def test_it_says_why_it_cannot(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file") as caught:
        keep_size(file.fileno(), 0, 1)
    assert caught.value.errno == errno.EBADF  # not open for writing
