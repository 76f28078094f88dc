"""Room ahead of a guest: what is to be reserved, where the threshold lies, what files tell."""

import contextlib
import errno
import os
import subprocess
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.allocation import rawfile as reserving
from qmpblock.allocation import room as headroom
from qmpblock.allocation.room import (
    Place,
    Space,
    fill,
    find_place,
    look,
    missing,
    result_of,
    rounded_room,
    threshold,
)
from qmpblock.errors import Error, RequestError, UnsupportedError
from qmpblock.graph.model import Chain, Device, Edge, Layer, Node
from qmpblock.host.space import reserved_ranges
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount

K = 1 << 10
M = 1 << 20

sets = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 40)).map(lambda one: (one[0], sum(one)))
).map(Ranges)


def bytes_of(ranges):
    return [byte for start, stop in ranges for byte in range(start, stop)]


# -- pure


@given(sets, st.integers(1, 500))
def test_half_of_the_room_lies_above_the_threshold(room, half):
    offset = threshold(room, half)
    if room.total < half:
        assert offset is None
    else:
        above = [byte for byte in bytes_of(room) if byte >= offset]
        # At offset 0 there would be no threshold for QEMU.
        assert len(above) == half - (offset == 1 and 0 in room and half == room.total)


def test_no_room_has_no_threshold():
    assert threshold(Ranges(), 1) is None
    assert threshold(Ranges([(5, 10)]), 0) is None
    assert threshold(Ranges([(0, 10)]), 10) == 1


@given(sets, sets, st.integers(1, 500))
def test_what_is_missing_inside_a_disk(room, blank, size):
    blank = blank - room
    todo = missing(Space(room, blank), size)
    assert todo - blank == Ranges()
    assert todo.total == min(max(0, size - room.total), blank.total)


def test_what_is_missing_past_the_end_of_a_file():
    assert missing(Space(Ranges(), None, end=100), 50) == Ranges([(100, 150)])
    # Some is there, with a gap, as where a file system rounds to its blocks.
    there = Ranges([(104, 120)])
    assert missing(Space(there, None, end=100), 50) == Ranges([(100, 104), (120, 150)])
    assert missing(Space(Ranges([(100, 150)]), None, end=100), 50) == Ranges()
    assert missing(Space(Ranges([(100, 900)]), None, end=100), 50) == Ranges()


def test_sizes_are_whole_blocks():
    assert rounded_room(1) == 64 * K
    assert rounded_room(64 * K) == 64 * K
    assert rounded_room(64 * K + 1) == 128 * K
    for size in (0, -1):
        with pytest.raises(RequestError, match="none"):
            rounded_room(size)


# -- files


def place(path, size=None, start=0):
    """Return where the room of a disk is; without `size` its file grows at its end."""
    node = Node("f", "file", str(path), 0, False)
    layer = Layer(0, Node("d", "raw", str(path), 0, False), node)
    return Place(str(path), os.getpid(), layer, None if size is None else start, size or 0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x" * M)
    if reserved_ranges(str(path), M) is None:
        pytest.skip("this file system has no FIEMAP")
    with path.open("r+b"):  # as a VM's process has it
        yield path


def reserve(path, offset, length):
    subprocess.run(["fallocate", "-n", "-o", str(offset), "-l", str(length), str(path)], check=True)


async def test_room_past_the_end_is_used_by_writes_and_made_again(file):
    where = place(file)
    assert look(where, M) == Space(Ranges(), None, M)
    reserved, space = await fill(where, look(where, M), 2 * M, None)
    assert reserved == 2 * M
    assert space == Space(Ranges([(M, 3 * M)]), None, M)
    blocks = file.stat().st_blocks
    with file.open("ab") as opened:
        opened.write(b"y" * (M // 2))
    # Before anything is written back: a file's size tells at once.
    assert look(where, M).room == Ranges([(M + M // 2, 3 * M)])
    assert file.stat().st_blocks == blocks
    assert await fill(where, look(where, M), M, None) == (0, look(where, M))  # enough is there
    reserved, space = await fill(where, look(where, M), 2 * M, None)
    assert (reserved, space.room.total) == (M // 2, 2 * M)
    assert file.read_bytes() == b"x" * M + b"y" * (M // 2)


async def test_an_end_within_a_block_is_no_shortage_for_ever(file):
    with file.open("ab") as opened:
        opened.write(b"y" * 777)
    where = place(file)
    await fill(where, look(where, M), 192 * K, None)
    assert missing(look(where, M), 192 * K) == Ranges()


async def test_room_inside_a_disk_is_the_lowest_blank(file):
    with file.open("r+b") as opened:
        opened.truncate(8 * M)
        os.pwrite(opened.fileno(), b"z" * M, 3 * M)
        os.fsync(opened.fileno())
    where = place(file, 8 * M)
    reserved, space = await fill(where, look(where, 3 * M), 3 * M, None)
    assert reserved == 3 * M
    assert space.room == Ranges([(M, 3 * M), (4 * M, 5 * M)])
    assert space.blank == Ranges([(5 * M, 8 * M)])
    # More than there is: all of it, and it says so.
    _, space = await fill(where, space, 99 * M, None)
    assert (space.room.total, space.blank) == (6 * M, Ranges())
    disk = SimpleNamespace(name="d")
    assert result_of(disk, where, 99 * M, space, 0, space).full


def test_a_disk_that_begins_within_its_file(file):
    os.truncate(file, 8 * M)
    reserve(file, M, 4 * M)
    where = place(file, 2 * M, start=2 * M)
    # Offsets are the file's. What lies before and behind the disk does not count.
    assert look(where, M) == Space(Ranges([(2 * M, 4 * M)]), Ranges())


def test_a_disk_is_no_larger_than_its_file_whatever_the_vm_says(file):
    os.truncate(file, 2 * M)
    assert look(place(file, 1 << 62), M).blank == Ranges([(M, 2 * M)])


def test_what_was_just_written_is_no_room_any_more(file):
    reserve(file, 0, 8 * M)
    with file.open("r+b") as opened:
        opened.truncate(8 * M)
        os.pwrite(opened.fileno(), b"y" * M, M)  # in the page cache
        for wanted in (8 * M, M):
            assert look(place(file, 8 * M), wanted).room == Ranges([(2 * M, 8 * M)])


def test_what_was_read_is_room_still(file):
    reserve(file, 0, 8 * M)
    with file.open("r+b") as opened:
        opened.truncate(8 * M)
        assert os.pread(opened.fileno(), 4 * M, M) == bytes(4 * M)
    assert look(place(file, 8 * M), 7 * M).room == Ranges([(M, 8 * M)])


async def test_a_file_system_that_cannot_tell(file, monkeypatch):
    monkeypatch.setattr(headroom, "reserved_ranges", lambda *_, **__: None)
    where = place(file)
    space = look(where, M)
    assert (space.room, space.known) == (Ranges(), False)
    reserved, space = await fill(where, space, 2 * M, None)
    assert (reserved, space.room) == (2 * M, Ranges([(M, 3 * M)]))  # by our own account
    disk = SimpleNamespace(name="d")
    assert result_of(disk, where, 2 * M, space, reserved, space).room is None
    assert (await fill(where, look(where, M), 2 * M, None))[0] == 0  # it is there already
    with pytest.raises(UnsupportedError, match="cannot tell"):
        look(place(file, 8 * M), M)


async def test_what_must_stay_free_stays_free(file):
    where = place(file)
    blocks = file.stat().st_blocks
    with pytest.raises(Error, match="are to stay so") as caught:
        await fill(where, look(where, M), M, Amount(1 << 60))
    assert caught.value.exit_code == 1
    assert file.stat().st_blocks == blocks
    assert (await fill(where, look(where, M), M, Amount(1)))[0] == M


async def test_no_space_on_the_host(file, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reserving, "keep_size", fail)
    with pytest.raises(Error, match="No space left"):
        await fill(place(file), look(place(file), M), M, None)


async def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(Error, match="cannot look at"):
        await headroom.look_at(place(tmp_path / "gone"), M)


# -- formats


def disk(fmt, *children, path="/nowhere", driver="file", data_file=None):
    """Return what stands for a disk whose QEMU cannot be seen from here."""
    storage = Node("f", driver, path, 0, False)
    node = Node("d", fmt, path, 0, False, children=tuple(Edge(name, "f") for name in children))
    chain = Chain((), (Layer(0, node, storage, data_file),), (0,), (0,))
    return SimpleNamespace(
        chain=chain,
        device=Device("vd0", None, "/machine/peripheral/vd0", False, False, chain),
        size=M,
        vm=SimpleNamespace(
            monitor=SimpleNamespace(peer_pid=os.getpid()), unless_gone=contextlib.nullcontext
        ),
    )


async def test_where_a_format_grows(file):
    with file.open("rb"):  # as QEMU would
        for fmt in ("qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"):
            found = await find_place(disk(fmt, "file", path=str(file)))
            assert (found.file, found.start, found.node) == (str(file), None, "f")
        data = Node("data", "file", str(file), 0, False)
        found = await find_place(disk("qcow2", "file", "data-file", data_file=data))
        assert (found.file, found.start, found.node) == (str(file), 0, "data")
        found = await find_place(disk("raw", "file", path=str(file)))
        assert (found.file, found.start, found.node) == (str(file), 0, "f")


@pytest.mark.parametrize(
    ("fmt", "children", "words"),
    [
        ("parallels", ("file",), "parallels image grows is not known"),
        ("vmdk", ("file", "extents.0"), "in several files"),
        ("qcow2", ("file",), "cannot be found from here"),
        ("raw", ("file",), "cannot be found from here"),
    ],
)
async def test_what_can_have_no_room_is_refused(fmt, children, words):
    with pytest.raises(UnsupportedError, match=words) as caught:
        await find_place(disk(fmt, *children))
    assert caught.value.standing == "nothing was touched"


async def test_block_devices_and_remote_storage_are_refused():
    for fmt in ("raw", "qcow2"):
        with pytest.raises(UnsupportedError, match="is a block device"):
            await find_place(disk(fmt, "file", driver="host_device"))
        with pytest.raises(UnsupportedError, match="is no file of this host"):
            await find_place(disk(fmt, "file", driver="nbd"))
