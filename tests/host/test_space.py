"""How much can be reserved at all: the end of the file, its file system, the process's limit."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys

import pytest

from qmpblock.errors import Error, RequestError
from qmpblock.host.space import check_reservable, end_of

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
