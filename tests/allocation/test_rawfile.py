"""Reserving by fallocate(2): blocks, and nothing else."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from otherusers import within

from qmpblock.allocation import rawfile as reserving
from qmpblock.allocation.rawfile import blank_ranges, holes
from qmpblock.errors import Error, RequestError, UnsupportedError
from qmpblock.host.imagefiles import reserved_ranges
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    """A file that this process has open for writing, as a VM's process has."""
    path = tmp_path / "disk.raw"
    path.touch()
    with path.open("r+b"):
        yield path


async def test_blocks_are_reserved_and_nothing_else_changes(file):
    with file.open("wb") as written:
        written.truncate(8 * MIB)
        written.seek(3 * MIB)
        written.write(b"data")
    before, told = file.read_bytes(), []
    ranges = [(MIB, 4 * MIB), (6 * MIB, 7 * MIB)]
    more = await reserving.reserve_ranges(
        str(file), os.getpid(), ranges, speed=Speed(), tell=lambda *now: told.append(now)
    )
    assert file.read_bytes() == before
    assert more >= 4 * MIB - 64 * 1024
    assert told[-1] == (4 * MIB, 4 * MIB)
    again = await reserving.reserve_ranges(str(file), os.getpid(), ranges, speed=Speed())
    assert again == 0


async def test_nothing_is_reserved_beyond_the_disk_that_the_file_holds(file):
    """The ranges come from what the VM says of its size; the file's is the kernel's word."""
    with file.open("wb") as written:
        written.truncate(MIB + 1)
    for ranges in ([(0, MIB), (MIB, 2 * MIB)], [(0, 1 << 62)]):
        with pytest.raises(RequestError, match=f"ends at byte {MIB + 512}"):
            await reserving.reserve_ranges(str(file), os.getpid(), ranges, speed=Speed())
    assert file.stat().st_blocks == 0
    ranges = [(0, MIB + 512)]
    assert await reserving.reserve_ranges(str(file), os.getpid(), ranges, speed=Speed())
    assert file.stat().st_size == MIB + 1


async def test_a_speed_cuts_it_into_pieces(file, monkeypatch):
    with file.open("wb") as written:
        written.truncate(8 * MIB)
    pieces = []
    monkeypatch.setattr(reserving, "keep_size", lambda fd, *piece: pieces.append(piece))
    ranges = [(512, 512 + 5 * MIB)]
    await reserving.reserve_ranges(str(file), os.getpid(), ranges, speed=Speed(64 * MIB))
    assert sum(length for _, length in pieces) == 5 * MIB
    assert pieces[0][0] == 512
    for (at, length), (after, _) in itertools.pairwise(pieces):
        assert at + length == after
    assert max(length for _, length in pieces) < 64 * MIB


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EOPNOTSUPP, UnsupportedError, "cannot reserve"),
        (errno.ENOSPC, Error, "No space left"),
    ],
)
async def test_what_cannot_be_is_said(file, monkeypatch, number, kind, words):
    file.write_bytes(bytes(MIB))

    def fail(*_):
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(reserving, "keep_size", fail)
    with pytest.raises(kind, match=words) as caught:
        await reserving.reserve_ranges(str(file), os.getpid(), [(0, MIB)], speed=Speed())
    assert caught.value.standing is not None


def test_what_of_a_file_has_no_host_space(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"x" * MIB)
        file.truncate(8 * MIB)
        os.pwrite(file.fileno(), b"y" * MIB, 4 * MIB)
        os.fsync(file.fileno())
    assert blank_ranges(str(path), 0, 8 * MIB) == Ranges([(MIB, 4 * MIB), (5 * MIB, 8 * MIB)])
    # A disk that begins within the file, as LUKS's payload does.
    assert blank_ranges(str(path), 2 * MIB, 4 * MIB) == Ranges([(0, 2 * MIB), (3 * MIB, 4 * MIB)])
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
    assert blank_ranges(str(path), 0, 8 * MIB) == Ranges()


@pytest.mark.parametrize("look", [holes, lambda path, *_: reserved_ranges(path, MIB)])
def test_a_fifo_in_the_place_of_the_file_is_no_file(tmp_path, look):
    """Opening one waits for its other end, for ever, and SIGTERM does nothing."""
    os.mkfifo(tmp_path / "fifo")
    with within(5):
        try:
            assert look(str(tmp_path / "fifo"), 0, MIB) is None
        except OSError as error:
            assert error.errno == errno.EINVAL
