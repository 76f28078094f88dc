"""What runs that were killed leave is swept by the next one, and nothing else is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpblock.errors import RequestError
from qmpblock.testing import scratch
from qmpblock.testing.scratch import keep, private_directory, remove

pytest_plugins = ["pytester"]

HOLD = """
import sys
from qmpblock.testing.scratch import private_directory
print(private_directory(), flush=True)
sys.stdin.read()
"""

DEATHS = {
    "kill -9": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "the end of a test's time": "os._exit(1)",  # pytest-timeout's method `thread`
}


@pytest.fixture
def base(vm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a temporary directory of a test's own, with a short path."""
    path = vm_dir / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", str(path))
    monkeypatch.setattr(scratch, "_swept", set())
    return path


@pytest.fixture
def other(base: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start another run, which holds a directory."""
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def abandoned(base: Path, name: str) -> Path:
    """Make what a killed run leaves."""
    path = base / name
    path.mkdir(0o700)
    (path / ".owner").write_text("process 1\n")
    (path / "images").mkdir()
    (path / "images" / "d0.qcow2").write_bytes(b"x" * 1000)
    return path


@pytest.mark.parametrize("death", DEATHS)
def test_a_run_that_is_killed_is_swept_by_the_next(
    death: str, pytester: pytest.Pytester, base: Path
) -> None:
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    pytester.makepyfile(
        test_dying=f"""
        import os, signal
        from qmpblock.testing import parse_scenario

        async def test_it(start_qemu, vm_dir):
            vm = await start_qemu(parse_scenario("about: A.\\nimages: [{{size: 1M}}]\\n", "a"))
            print("pid", vm.pid)
            {DEATHS[death]}
        """,
        test_next="def test_it(vm_dir): pass",
    )
    pytester.runpytest_subprocess("-s", "test_dying.py")
    [left] = base.glob("qt-*")
    assert list(left.rglob("*.qcow2"))
    pytester.runpytest_subprocess("test_next.py").assert_outcomes(passed=1)
    assert list(base.iterdir()) == []


def test_a_directory_whose_owner_lives_stays(
    base: Path, other: tuple[subprocess.Popen[str], Path]
) -> None:
    process, directory = other
    gone = abandoned(base, "qt-gone")
    assert scratch.sweep(base) == [gone]
    assert directory.exists()
    process.kill()
    process.wait()
    assert scratch.sweep(base) == [directory]


def test_a_directory_that_is_none_of_ours_stays(base: Path, tmp_path: Path) -> None:
    (base / "qt-creator").mkdir()
    (base / "qt-creator" / "settings").write_text("dear")
    outside = abandoned(tmp_path, "elsewhere")
    (base / "qt-link").symlink_to(outside)
    for name in ("qt-linked", "qt-fifo"):
        (base / name).mkdir()
    (base / "qt-linked" / ".owner").symlink_to(outside / ".owner")
    os.mkfifo(base / "qt-fifo" / ".owner")
    (base / "qt-file").write_text("a file")
    before = sorted(base.iterdir())
    assert scratch.sweep(base) == []
    assert sorted(base.iterdir()) == before
    assert (outside / "images").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_a_directory_of_another_user_stays(base: Path) -> None:
    theirs, mark = abandoned(base, "qt-theirs"), abandoned(base, "qt-mark")
    os.chown(theirs, 65534, 65534)
    os.chown(mark / ".owner", 65534, 65534)
    assert scratch.sweep(base) == []
    assert theirs.exists()
    assert mark.exists()


def test_a_kept_directory_stays(base: Path) -> None:
    kept = scratch.private_directory()
    (kept / "qemu.log").write_text("evidence")
    scratch.keep(kept)
    gone = abandoned(base, "qt-gone")
    assert scratch.sweep(base) == [gone]
    assert (kept / "qemu.log").exists()


def test_only_what_this_process_owns_is_removed_at_its_end(
    base: Path, other: tuple[subprocess.Popen[str], Path]
) -> None:
    program = (
        "import os\n"
        "from qmpblock.testing.scratch import private_directory\n"
        "made = private_directory()\n"
        "if os.fork() == 0: raise SystemExit\n"
        "os.wait()\n"
        "assert made.exists(), 'its fork removed it'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list(base.iterdir()) == [other[1]]


def test_many_sweep_at_once_and_meet_none_that_lives(base: Path) -> None:
    """Each process makes a directory, which sweeps, and writes into it while others sweep."""
    for number in range(40):
        abandoned(base, f"qt-{number}")
    program = (
        "from qmpblock.testing import scratch\n"
        "for number in range(60):\n"
        "    scratch._swept.clear()\n"
        "    made = scratch.private_directory()\n"
        "    (made / 'file').write_text('x')\n"
        "    assert (made / 'file').read_text() == 'x'\n"
        "    scratch.remove(made)\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert list(base.iterdir()) == []


def test_what_a_test_has_closed_to_itself_is_removed(base: Path) -> None:
    made = scratch.private_directory()
    (made / "a" / "b").mkdir(parents=True)
    (made / "a" / "b" / "file").write_text("x")
    (made / "a" / "b").chmod(0)
    (made / "a").chmod(0o500)
    scratch.remove(made)
    assert list(base.iterdir()) == []
    scratch.remove(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_small_file_system_goes_and_what_others_mounted_is_not_emptied(
    base: Path, tmp_path: Path
) -> None:
    small, strange = abandoned(base, "qt-small"), abandoned(base, "qt-strange")
    (tmp_path / "dear").write_text("dear")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "qmpblock", str(small / "images")]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("this root may not mount")
    subprocess.run(["mount", "--bind", str(tmp_path), str(strange / "images")], check=True)
    try:
        assert scratch.sweep(base) == [small]
        assert (tmp_path / "dear").read_text() == "dear"
    finally:
        subprocess.run(["umount", str(strange / "images")], check=True)
    assert scratch.sweep(base) == [strange]


def test_where_there_is_no_place_that_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(base / "missing"))
    with pytest.raises(RequestError, match=r"cannot make a directory in .*missing: No such file"):
        scratch.private_directory()


def test_a_long_name_gets_a_short_one_where_tmp_cannot_be_written(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = base / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    make = scratch._make

    def only_there(place: Path) -> Path:
        if place != long:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(place)

    monkeypatch.setattr(scratch, "_make", only_there)
    directory = private_directory()
    assert len(str(directory)) < 40
    (directory / "file").write_text("x")
    [real] = long.iterdir()
    assert real.samefile(directory)
    remove(directory)
    assert list(long.iterdir()) == []
    keep(private_directory())
    assert len(list(long.iterdir())) == 1
    long.chmod(0o500)
    monkeypatch.setattr(scratch, "_make", lambda place: only_there(Path("/elsewhere")))
    with pytest.raises(RequestError, match=r"too long .* neither there .*nor in /tmp .*Read-only"):
        private_directory()
