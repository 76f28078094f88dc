"""Who has a file open for writing, also one who takes no locks."""

import json
import subprocess
import sys

import pytest
from imagelocks import lock

from qmpblock.errors import Error, InUseError
from qmpblock.host.writers import check_unchanged, check_unwritten

WRITER = "import sys; file = open(sys.argv[1], sys.argv[2]); print('open', flush=True); input()"


@pytest.fixture
def opened():
    processes = []

    def start(path, mode):
        command = [sys.executable, "-c", WRITER, str(path), mode]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"open\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.communicate(b"\n")


@pytest.mark.parametrize("mode", ["r+", "a"])
def test_a_writer_is_named(tmp_path, opened, mode):
    path, other = tmp_path / "image", tmp_path / "other"
    path.write_bytes(b"x")
    other.write_bytes(b"x")
    writer = opened(path, mode)
    link = tmp_path / "link"
    link.symlink_to(path)
    described = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(path)}})
    for name in (str(path), str(link), f"json:{described}"):
        with pytest.raises(InUseError, match=f"process {writer.pid}") as caught:
            check_unwritten([str(other), name])
        assert caught.value.exit_code == 2
    check_unwritten([str(other)])


def test_readers_do_not_count_nor_does_what_is_not_there(tmp_path, opened):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    opened(path, "r")
    check_unwritten([str(path), str(tmp_path / "none"), str(tmp_path), "a\0b"])


def test_a_lock_that_says_so_counts_although_its_holder_is_not_seen(tmp_path):
    """Another user's QEMU: what it has open is not shown, its locks are."""
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with path.open("rb") as file:  # only for reading, so that nothing but the lock says it
        lock(file, 100)
        check_unwritten([str(path)])
        lock(file, 101)
        with pytest.raises(InUseError, match="by its locks"):
            check_unwritten([str(path)])


def test_what_is_written_meanwhile_is_told(tmp_path):
    path, other = tmp_path / "image", tmp_path / "other"
    path.write_bytes(b"x")
    before = check_unwritten([str(path)])
    check_unchanged(before)
    path.write_bytes(b"y")
    with pytest.raises(Error, match="was written to"):
        check_unchanged(before)
    before = check_unwritten([str(path)])
    other.write_bytes(b"y")
    other.rename(path)
    with pytest.raises(Error, match="or replaced"):
        check_unchanged(before)
