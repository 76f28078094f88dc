"""Files whose pages go to storage before anybody waits."""

import errno
import os
import time

import pytest

from qmpblock.host.writeback import begin_writeback

SIZE = 4 << 20


def never_written(path, begin):
    """Return how many bytes are dropped unwritten, by the kernel's count, where a file is cut."""
    with path.open("w+b") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        begin(file.fileno())
        before = dropped()
        os.ftruncate(file.fileno(), 0)
        return dropped() - before


def dropped():
    with open("/proc/thread-self/io") as file:
        words = dict(line.split(":") for line in file)
    return int(words["cancelled_write_bytes"])


def test_what_is_written_is_on_its_way(tmp_path):
    if never_written(tmp_path / "file", lambda _: None) < SIZE:
        pytest.skip("no storage below the page cache here, or a kernel that does not count")
    deadline = time.monotonic() + 120
    while never_written(tmp_path / "file", begin_writeback):
        assert time.monotonic() < deadline


def test_it_says_why_it_cannot():
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek") as caught:
            begin_writeback(writing)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)
