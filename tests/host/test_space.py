"""What of a file has host space, and how much it can be given."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from fractions import Fraction

import pytest
from otherusers import within

from qmpblock.errors import Error, RequestError
from qmpblock.host.space import (
    HostSpace,
    blank_ranges,
    check_reservable,
    end_of,
    holes,
    reserved_ranges,
)
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as written:
        written.truncate(MIB + 1)
    return path


def test_a_raw_disk_ends_where_its_last_sector_does(file):
    assert end_of(str(file)) == MIB + 512


def test_what_the_file_holds_can_be_reserved(file):
    check_reservable(str(file), os.getpid(), [(0, 4096), (MIB, MIB + 512)])
    check_reservable(str(file), os.getpid(), [])
    check_reservable(str(file), os.getpid(), [(2 * MIB, 3 * MIB)], grows=True)


def test_beyond_its_end_nothing_is(file):
    with pytest.raises(RequestError, match=f"to byte {MIB + 513} of .* ends at byte {MIB + 512}"):
        check_reservable(str(file), os.getpid(), [(0, 1), (MIB, MIB + 513)])


def test_no_more_than_the_file_system_is_large(file):
    found = os.statvfs(file)
    whole = found.f_blocks * found.f_frsize
    half = [(0, whole // 2), (whole, whole + whole // 2)]
    check_reservable(str(file), os.getpid(), half, grows=True)
    with pytest.raises(RequestError, match=f"is of {whole} bytes in all") as caught:
        check_reservable(str(file), os.getpid(), [(0, whole + 1)], grows=True)
    assert caught.value.standing == "nothing was reserved"
    with file.open("r+b") as opened, pytest.raises(RequestError, match=re.escape(str(file))):
        check_reservable(str(file), os.getpid(), [(0, 1 << 63)], fd=opened.fileno(), grows=True)


def test_no_more_than_the_process_may_write(file):
    """fallocate(2) without a change of size does not ask for that limit, of anybody."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (MIB, MIB))
    check_reservable(str(file), child.pid, [(0, MIB)])
    with pytest.raises(RequestError, match="RLIMIT_FSIZE") as caught:
        check_reservable(str(file), child.pid, [(0, MIB + 1)])
    assert f"--pid {child.pid}" in caught.value.remedy
    child.communicate()
    check_reservable(str(file), child.pid, [(0, MIB + 1)])  # who borrows its file will see


def test_a_file_that_has_gone(tmp_path):
    with pytest.raises(Error, match="No such file"):
        check_reservable(str(tmp_path / "none"), os.getpid(), [(0, 1)])


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


def test_how_much_is_free_and_what_of_it_must_stay_so(file):
    seen = os.statvfs(file)
    whole = seen.f_blocks * seen.f_frsize
    space = HostSpace.of(str(file), Amount(percent=Fraction(50)))
    assert (space.device, space.keep) == (file.stat().st_dev, whole // 2)
    assert 0 < space.free <= whole
    assert HostSpace.of(str(file)).keep == 0
    told = HostSpace(str(file), 0, free=100, keep=10)
    assert [told.leaves(taken) for taken in (0, 90, 91)] == [True, True, False]
    again = told.now()  # of the file system, and what must stay free is still told
    assert (again.device, again.keep) == (space.device, 10)
    assert again.free > 100
