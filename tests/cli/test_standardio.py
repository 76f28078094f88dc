"""What a command makes of a stdout or stderr that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpblock.cli import app

ROOT = Path(__file__).parents[2]
FULL = OSError(28, "No space left on device")
READER = "import sys; from qmpblock.cli.standardio import take_over; output = take_over(); "


def ran(code, redirected, **options):
    """Run Python with its streams redirected as a shell would; return the exit code and stdout."""
    words = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, code]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, timeout=60, **options)
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_what_stderr_cannot_take_is_lost_and_the_work_goes_on(redirected, tmp_path):
    done = tmp_path / "done"
    code = READER + (
        "import click\n"
        "for n in range(1000): click.echo(f'{n} of 1000', err=True)\n"
        f"open({str(done)!r}, 'w')"
    )
    assert ran(code, redirected) == (0, "")
    assert done.exists()


def test_nothing_that_is_opened_gets_the_number_of_a_closed_stream():
    code = READER + "import os; print(os.open('/', os.O_RDONLY)); print('x', file=sys.stderr)"
    assert ran(code, "<&- 2>&-") == (0, "3\n")


def test_a_closed_stdout_leads_nowhere():
    assert ran(READER + "print('x'); sys.exit(bool(output.lost))", ">&-") == (0, "")


def test_one_that_does_not_block_is_waited_for():
    """Whoever shares a pipe can have it be so: then all is written even so, as it is read."""
    code = READER + "import os; os.set_blocking(1, False); print('x' * (1 << 20)); sys.exit(7)"
    assert ran(code, "| { sleep 0.2; wc -c; }") == (0, f"{(1 << 20) + 1}\n")


@pytest.mark.parametrize(
    ("lost", "code", "arguments", "wanted", "said"),
    [
        (None, 0, ["map"], 0, ""),
        (FULL, 0, ["map"], 1, "cannot write the output: No space left on device\n"),
        (FULL, 0, ["--version"], 1, "cannot write the output: No space left on device\n"),
        (FULL, 0, ["migrate"], 4, "No space left on device\n  what it was to tell of is done\n"),
        (FULL, 1, ["migrate"], 1, "cannot write the output: No space left on device\n"),
        (FULL, 7, ["export"], 7, "cannot write the output: No space left on device\n"),
        (BrokenPipeError(), 0, ["map"], 1, ""),
        (BrokenPipeError(), 0, ["migrate"], 0, ""),
        (BrokenPipeError(), 4, ["copy"], 4, ""),
    ],
)
def test_the_exit_code_of_what_could_not_be_said(lost, code, arguments, wanted, said, capsys):
    assert app.delivered(code, arguments, lost) == wanted
    err = capsys.readouterr().err
    assert err.endswith(said)
    assert bool(err) == bool(said)


@pytest.mark.parametrize(("words", "code"), [(["--version"], 1), (["--help"], 1)])
def test_a_full_disk_is_told(words, code):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qmpblock", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert (done.returncode, done.stderr) == (
        code,
        b"qmpblock: cannot write the output: No space left on device\n",
    )
