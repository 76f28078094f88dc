"""Blocks for a file, and from it."""

import errno

import pytest

from qmpblock.host.fallocate import keep_size, punch_hole


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


def test_what_is_taken_reads_as_zeros_and_the_size_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 16))
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 4096, 1 << 15)
    data = path.read_bytes()
    assert data == b"x" * 4096 + bytes(1 << 15) + b"x" * ((1 << 16) - (1 << 15) - 4096)
    assert path.stat().st_blocks * 512 <= 1 << 15


@pytest.mark.parametrize("size", [1000448, 1 << 16, 1])
def test_what_is_taken_to_the_end_leaves_no_block(tmp_path, size):
    path = tmp_path / "file"
    with path.open("w+b") as file:
        file.truncate(size)
        keep_size(file.fileno(), 0, size)
        punch_hole(file.fileno(), 0, size)
    assert (path.stat().st_size, path.stat().st_blocks) == (size, 0)
