"""What a process's threads wait for is read from /proc."""

import fcntl
import os
import platform
import subprocess
import sys
import time

import pytest

from qmpblock.testing.threads import threads


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_threads_say_what_they_wait_for_and_of_which_file(tmp_path):
    path = tmp_path / "image"
    with path.open("w") as held, path.open("w") as wanted:
        fcntl.flock(held, fcntl.LOCK_EX)
        program = (
            f"import fcntl, threading, time\n"
            f"threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
            f"fcntl.flock({wanted.fileno()}, fcntl.LOCK_EX)"
        )
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, pass_fds=[wanted.fileno()]) as process:
            deadline = time.monotonic() + 120
            said = ""
            while "flock" not in said and time.monotonic() < deadline:
                time.sleep(0.02)
                said = "\n".join(threads(process.pid))
            process.kill()
    assert f" waits in flock of {path}, at " in said
    assert " waits in clock_nanosleep, at " in said or " waits in futex" in said
    if os.geteuid() == 0:
        assert "locks_lock_inode_wait < " in said


def test_a_process_that_has_ended_has_no_threads():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert threads(process.pid) == []
