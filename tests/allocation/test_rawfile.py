"""Reserving by fallocate(2): blocks, and nothing else."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from qmpblock.allocation import rawfile as reserving
from qmpblock.errors import Error, RequestError, UnsupportedError
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
