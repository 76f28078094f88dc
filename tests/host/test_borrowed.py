"""Borrowing a file from a process: only one that it may write to, and in its user's name."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmpblock.errors import DisconnectedError, UnsupportedError
from qmpblock.host.borrowed import in_the_name_of, open_as_it_has
from qmpblock.host.fallocate import keep_size

NOBODY = 65534
HOLDER = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has more rights than a VM's user")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4096)
    return path


@pytest.fixture
def hold():
    """Have a process that has a file open, and return its pid."""
    started = []

    def start(path, mode):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        process.stdout.readline()
        return process.pid

    yield start
    for process in started:
        process.communicate()


def test_what_it_writes_to_is_opened(image, hold):
    fd = open_as_it_has(hold(image, "r+"), str(image))
    try:
        assert os.fstat(fd).st_ino == image.stat().st_ino
        keep_size(fd, 4096, 1 << 20)
    finally:
        os.close(fd)
    assert image.stat().st_blocks * 512 > 1 << 20


def test_what_it_may_only_read_is_not(image, hold):
    with pytest.raises(UnsupportedError, match="not open for writing") as caught:
        open_as_it_has(hold(image, "r"), str(image))
    assert caught.value.standing == "nothing was touched"


def test_a_name_that_leads_to_another_file_is_none(image, hold):
    pid = hold(image, "r+")
    image.rename(image.with_name("renamed"))
    image.write_bytes(b"another")
    with pytest.raises(UnsupportedError, match="not open for writing"):
        open_as_it_has(pid, str(image))


def test_a_fifo_in_its_place_blocks_nobody(image, hold):
    pid = hold(image, "r+")
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UnsupportedError, match="not open for writing"):
        open_as_it_has(pid, str(image))


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_process_that_has_ended(image, reaped):
    process = subprocess.Popen(["true"])
    options = os.WEXITED if reaped else os.WEXITED | os.WNOWAIT
    os.waitid(os.P_PID, process.pid, options)
    with pytest.raises(DisconnectedError, match=f"the VM's process {process.pid} has ended"):
        open_as_it_has(process.pid, str(image))
    process.wait()


@as_root
def test_root_that_may_not_take_it_does_not_guess(image, hold):
    """CAP_SYS_PTRACE is what it takes, also of a process of root's that has more than this one."""
    pid = hold(image, "r+")
    program = (
        "import sys; from qmpblock.host.borrowed import open_as_it_has;"
        "open_as_it_has(int(sys.argv[1]), sys.argv[2])"
    )
    dropped = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", "--"]
    done = subprocess.run(
        [*dropped, sys.executable, "-c", program, str(pid), image], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(r"does not let root take a descriptor|only its user and root", done.stderr)


def status() -> tuple[int, int]:
    text = Path("/proc/thread-self/status").read_text()
    return (
        int(re.search(r"^Uid:(?:\s+\d+){3}\s+(\d+)$", text, re.MULTILINE)[1]),
        int(re.search(r"^CapEff:\s+(\w+)$", text, re.MULTILINE)[1], 16),
    )


@as_root
async def test_a_thread_has_another_name_for_a_while():
    def work():
        before = status()
        with in_the_name_of(NOBODY):
            during = status()
        return before, during, status()

    before, during, after = await asyncio.to_thread(work)
    assert before == after == status()
    assert during[0] == NOBODY
    assert not during[1] & 1 << 24  # CAP_SYS_RESOURCE
    assert not during[1] & 1 << 1  # CAP_DAC_OVERRIDE: it goes with the name


def test_the_event_loops_thread_keeps_its_name():
    with pytest.raises(RuntimeError, match="event loop"), in_the_name_of(NOBODY):
        pass


@as_root
async def test_blocks_that_are_kept_for_root_stay_so(tmp_path):
    """An ext4 file system half of which is kept for root."""
    disk, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "50", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True)
    try:
        with (folder / "image").open("wb") as file:
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize

            def reserve(user):
                with in_the_name_of(user):
                    keep_size(file.fileno(), 0, free + (4 << 20))

            with pytest.raises(OSError, match="No space left") as caught:
                await asyncio.to_thread(reserve, NOBODY)
            assert caught.value.errno == errno.ENOSPC
            await asyncio.to_thread(reserve, 0)
    finally:
        subprocess.run(["umount", folder], check=True)
