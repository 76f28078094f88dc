"""The script that ssh runs beside a destination: which files it tells of, by whatever names."""

import os
import subprocess
import sys

import pytest

from qmpblock.migration.serverthere import _MARK, _SCRIPT

#: What a QEMU is to it that waits for a guest, and has files open.
WAITS = (
    "import sys\n"
    "held = [open(name) for name in sys.argv[2:]]\n"
    "print(flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.fixture
def looked():
    """Give what has the script look at files that somebody has open; returns its lines."""
    waiting = []

    def look(*paths):
        command = (sys.executable, "-c", WAITS, "-incoming", *map(str, paths))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        waiting.append(subprocess.Popen(command, **pipes))
        waiting[-1].stdout.readline()
        words = ("look", "9", "/nowhere", str(len(paths)), *map(str, paths))
        script = ["sh", "-c", _SCRIPT, "sh", *words]
        done = subprocess.run(script, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield look
    for process in waiting:
        process.communicate()


def of(path):
    """Say what the mark of a file is."""
    told = path.stat()
    times = (f"{at // 10**9}.{at % 10**9:09}" for at in (told.st_mtime_ns, told.st_ctime_ns))
    return ":".join(map(str, (told.st_dev, told.st_ino, told.st_size, *times)))


NAMES = ["plain", "it's", "''", 'a "b" $HOME `id` \\e', " s p ", "new\nline", "*", "é"]


def test_it_tells_the_mark_of_each_file_whatever_it_is_called(looked, tmp_path):
    paths = [tmp_path / name for name in NAMES]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number)
    found, *marks = looked(*paths)
    assert found == "found"
    assert [_MARK.fullmatch(line)[1] for line in marks] == [of(path) for path in paths]
    before, now = marks[1], os.stat(paths[1])
    os.utime(paths[1], ns=(now.st_atime_ns, now.st_mtime_ns))  # as it was; yet it was touched
    assert looked(*paths)[2] != before


def test_of_what_is_no_file_it_tells_none(looked, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    held = os.open(tmp_path / "fifo", os.O_RDWR)  # else to open it would wait for somebody
    assert looked(tmp_path / "fifo") == ["found", "mark"]
    os.close(held)


def test_what_nobody_has_open_that_waits_is_not_looked_at(looked, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).touch()
    words = ("look", "9", "/nowhere", "1", str(tmp_path / "other"))
    done = subprocess.run(["sh", "-c", _SCRIPT, "sh", *words], capture_output=True, text=True)
    assert done.stdout == f"unseen {tmp_path / 'other'}\n"
