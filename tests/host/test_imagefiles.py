"""Files of a VM on this host: which they are, and what FIEMAP tells of them."""

import os
import subprocess

import pytest

from qmpblock.graph.model import Layer, Node
from qmpblock.host.imagefiles import home_of, local_path, reserved_ranges

MIB = 1 << 20


def layer(filename, driver="file"):
    storage = Node("s", driver, str(filename), MIB, False)
    return Layer(0, Node("f", "raw", str(filename), MIB, False), storage)


def test_a_file_counts_only_while_that_process_has_it_open(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    assert local_path(os.getpid(), layer(path)) is None
    with path.open():
        assert local_path(os.getpid(), layer(path)) == str(path)
        path.rename(tmp_path / "moved")
        path.write_bytes(b"another file of the same name")
        assert local_path(os.getpid(), layer(path)) is None


def test_relative_names_are_the_processs_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(b"x")
    with (tmp_path / "image").open():
        assert local_path(os.getpid(), layer("image")) == str(tmp_path / "image")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "image").write_bytes(b"y")
        with (tmp_path / "other" / "image").open():
            assert local_path(os.getpid(), layer("image")) is None
            assert local_path(os.getpid(), layer("./other/image")) is not None


def test_what_cannot_be_told_is_not_local(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with path.open():
        assert local_path(None, layer(path)) is None
        assert local_path(1 << 30, layer(path)) is None
        assert local_path(os.getpid(), layer(path, "nbd")) is None
        assert local_path(os.getpid(), layer(tmp_path / "gone")) is None
        assert local_path(os.getpid(), layer("bad\0name")) is None
        assert local_path(os.getpid(), Layer(0, layer(path).node, None)) is None


def test_an_image_is_at_home_under_its_real_name(tmp_path):
    (tmp_path / "image").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "link").symlink_to("../image")
    assert home_of(str(tmp_path / "dir" / "link")) == str(tmp_path / "image")
    gone = str(tmp_path / "gone")
    assert home_of(gone) == gone


def make(path, *, fallocate=(), write=()):
    with path.open("wb") as file:
        file.truncate(16 * MIB)
        for offset, length in fallocate:
            os.posix_fallocate(file.fileno(), offset, length)
        for offset, length in write:
            os.pwrite(file.fileno(), b"x" * length, offset)
        os.fsync(file.fileno())
    found = reserved_ranges(str(path), 16 * MIB)
    if found is None:
        pytest.skip("this file system has no FIEMAP")
    return list(found)


def test_fallocated_and_unwritten(tmp_path):
    path = tmp_path / "image"
    assert make(path) == []
    assert make(path, write=[(0, MIB)]) == []
    assert make(path, fallocate=[(2 * MIB, 2 * MIB)]) == [(2 * MIB, 4 * MIB)]
    assert make(path, fallocate=[(2 * MIB, 4 * MIB)], write=[(3 * MIB, MIB)]) == [
        (2 * MIB, 3 * MIB),
        (4 * MIB, 6 * MIB),
    ]


def test_more_extents_than_one_call_returns(tmp_path):
    pieces = [(i * 8192, 4096) for i in range(1500)]
    assert make(tmp_path / "image", fallocate=pieces) == [(o, o + n) for o, n in pieces]


def test_what_lies_past_the_disk_does_not_count(tmp_path):
    path = tmp_path / "image"
    make(path, fallocate=[(MIB, 2 * MIB)])
    assert list(reserved_ranges(str(path), 2 * MIB)) == [(MIB, 2 * MIB)]
    assert list(reserved_ranges(str(path), 0)) == []


def test_from_somewhere_in_an_extent_on_past_the_end(tmp_path):
    path = tmp_path / "image"
    make(path, fallocate=[(MIB, 2 * MIB)])
    subprocess.run(["fallocate", "-n", "-o", "16M", "-l", "4M", str(path)], check=True)
    found = reserved_ranges(str(path), 1 << 60, first=2 * MIB)
    assert list(found) == [(2 * MIB, 3 * MIB), (16 * MIB, 20 * MIB)]


def test_what_is_in_the_page_cache_counts_once_it_is_written_back(tmp_path):
    path = tmp_path / "image"
    make(path, fallocate=[(0, 4 * MIB)])
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"x" * MIB, 0)
        assert list(reserved_ranges(str(path), 4 * MIB, sync=True)) == [(MIB, 4 * MIB)]


def test_no_such_file_or_no_fiemap(tmp_path):
    assert reserved_ranges(str(tmp_path / "gone"), MIB) is None
    assert reserved_ranges("/proc/self/maps", MIB) is None
