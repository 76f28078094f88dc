"""What file systems can do, tried on real ones."""

import errno
import os
import subprocess

import pytest

from qmpblock.host import tryout
from qmpblock.host.tryout import clones, direct_unit, reserves


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)
    assert not list(tmp_path.iterdir())


def test_one_that_reserves(directory):
    assert reserves(directory)


def test_one_that_does_not(directory, monkeypatch):
    def refuses(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(tryout, "keep_size", refuses)
    assert not reserves(directory)


def test_a_full_one_is_no_answer(directory, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tryout, "keep_size", full)
    with pytest.raises(OSError, match="full"):
        reserves(directory)


def test_whether_files_share_blocks_is_as_cp_finds_it(directory, tmp_path):
    (tmp_path / "one").write_bytes(bytes(4096))
    command = ["cp", "--reflink=always", tmp_path / "one", tmp_path / "other"]
    can = subprocess.run(command, capture_output=True, check=False).returncode == 0
    for name in ("one", "other"):
        (tmp_path / name).unlink(missing_ok=True)
    assert clones(directory) is can


def test_the_unit_of_direct_writes_is_one_that_works(directory, tmp_path):
    unit = direct_unit(directory)
    if unit is None:
        pytest.skip("no direct I/O here")
    assert unit in (512, 4096, 65536)


def test_a_larger_unit_is_found(directory, monkeypatch):
    write = os.pwrite

    def picky(fd, data, offset):
        if len(data) < 4096:
            raise OSError(errno.EINVAL, "not aligned")
        return write(fd, data, offset)

    monkeypatch.setattr(tryout.os, "pwrite", picky)
    assert direct_unit(directory) == 4096


def test_no_direct_writes_at_all(directory, monkeypatch):
    opened = os.open

    def refuses(path, flags, *mode, **more):
        if flags & os.O_DIRECT == os.O_DIRECT and not flags & os.O_TMPFILE:
            raise OSError(errno.EINVAL, "no")
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(tryout.os, "open", refuses)
    assert direct_unit(directory) is None
