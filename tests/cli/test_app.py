"""The command line without a VM: exit codes, sizes, start-up."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from qmpblock import __version__
from qmpblock.cli import app
from qmpblock.cli.app import Size, run
from qmpblock.errors import ConnectError, Error


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"qmpblock {__version__}\n"


def test_help_names_every_command_and_exit_code(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("demo", "disks", "map", "130 interrupted"):
        assert word in out


@pytest.mark.parametrize("command", ["demo", "disks", "map"])
def test_every_command_has_help_and_the_shared_options(command, capsys):
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--json", "--stall", "--nbd", "--tls-creds", "--insecure"):
        assert option in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["disks"],
        ["map"],
        ["map", "a", "b", "c"],
        ["map", "a", "b", "--nosuch"],
        ["map", "a", "b", "--offset", "-1"],
        ["map", "a", "b", "--offset", "5Q"],
        ["map", "a", "b", "--length", "x"],
        ["map", "a", "b", "--offset", "99999999999E"],
        ["map", "a", "b", "--layers", "--totals"],
        ["map", "a", "b", "--json", "--svg", "x.svg"],
        ["map", "a", "b", "--format", "raw"],
        ["map", "a", "b", "--stall", "0"],
        ["disks", "tcp:nowhere"],
        ["disks", "host:99999"],
        ["map", "noformat"],
        ["map", "/nosuch/image.qcow2"],
    ],
)
def test_a_wrong_request_is_2_and_says_why(arguments, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip()


def test_no_monitor_is_3(capsys):
    assert run(["disks", "/nosuch/monitor"]) == 3
    assert "Remedy:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("1.5G", 3 << 29),
        ("0x10", 16),
        ("2T", 2 << 40),
        ("1B", 1),
    ],
)
def test_sizes(text, size):
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "K", "1KK", "-1", "1e400", "nan", "inf", "8E", "½"])
def test_no_sizes(text):
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


def test_a_command_in_another_thread_leaves_signals_alone(capsys):
    """There Python sets no handlers; whoever embeds it does."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, ["disks", "/nosuch/monitor"]).result() == 3
    assert "Remedy:" in capsys.readouterr().err


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "qmpblock", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"qmpblock {__version__}\n"


def test_a_command_imports_only_what_it_needs(tmp_path):
    """Start-up is what a script pays a thousand times."""
    probe = (
        "import sys; from qmpblock.cli.app import run; code = run(sys.argv[1:]); "
        "print(code, *[m for m in ('numpy', 'rich', 'asyncio', 'qemu.qmp', 'yaml', 'ssl') "
        "if m in sys.modules], file=sys.stderr)"
    )

    def loaded(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=True
        )
        return done.stderr.splitlines()[-1]

    assert loaded("--version") == "0"
    assert loaded("--help") == "0"
    assert "numpy" not in loaded("disks", "/nosuch")
    assert "rich" not in loaded("disks", "/nosuch")
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64K"], check=True)
    assert loaded("map", "--json", str(image)) == "0 numpy asyncio ssl"  # which asyncio takes


def test_every_json_schema_is_itself_valid():
    from jsonschema import Draft202012Validator

    schemas = list((Path(__file__).parents[2] / "docs" / "schema").glob("*.schema.json"))
    assert len(schemas) >= 5
    for path in schemas:
        schema = json.loads(path.read_text())
        Draft202012Validator.check_schema(schema)
        assert schema["$id"] == path.name


def test_interrupted_while_it_is_loaded():
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from qmpblock.cli import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr == "qmpblock: interrupted; nothing was touched\n"


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RuntimeError("odd \x1b[31m"), 1, r"RuntimeError: odd \x1b[31m"),
        (RecursionError("deep"), 1, "RecursionError: deep"),
        (MemoryError(), 1, "MemoryError"),
        (ExceptionGroup("g", [ExceptionGroup("h", [ConnectError("gone \x1b")])]), 3, r"gone \x1b"),
        (Error("a\nb \u202e\ud800 c"), 1, r"  b \u202e\ud800 c"),
        (Error(""), 1, "qmpblock: "),
    ],
)
def test_whatever_happens_is_one_message(raised, code, words, monkeypatch, capsys):
    def main(*_, **__):
        raise raised

    monkeypatch.setattr(app._group, "main", main)
    assert run(["disks", "x"]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert all(c.isprintable() or c == "\n" for c in said)


def test_a_developer_sees_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("QMPBLOCK_DEBUG", "1")
    monkeypatch.setattr(app._group, "main", lambda *_, **__: 1 // 0)
    assert run(["disks", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_names_that_cannot_be_written_are_escaped(tmp_path):
    """Neither half a surrogate pair, which a name on disk may give, nor a terminal of ASCII."""
    name = os.fsdecode(b"/nosuch/\xff\xc3\xa4.qcow2")
    done = subprocess.run(
        [sys.executable, "-m", "qmpblock", "map", name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert rb"\udcff" in done.stderr


def test_log_records_are_lines_that_are_safe_to_show():
    try:
        int("x")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "p", 1, "a %s\nb", ("\x1b",), sys.exc_info())
    assert app._OneLine("q: %(message)s").format(record) == "q: a \\x1b\n  b"


@pytest.mark.parametrize(("at_once", "code", "told"), [(1, 130, ["a"]), (2, 130, []), (0, 0, "ab")])
def test_interrupted_between_two_vms_it_does_not_go_on(at_once, code, told, monkeypatch):
    """Of one alone all is done then (tests/live/test_interrupted_late.py); of several it is not.

    :param at_once: how many VMs it is at work on when it is interrupted; 0: it is not.
    """
    done = []

    @contextlib.asynccontextmanager
    async def connect(address, **_):
        yield address
        if at_once:
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)

    async def one(options, address):
        async with options.connect(address) as vm:
            pass
        done.append(vm)

    async def work(options):
        if at_once < 2:
            for address in "ab":
                await one(options, address)
        else:
            await asyncio.gather(*(one(options, address) for address in "ab"))

    monkeypatch.setattr("qmpblock.vm.connect", connect)
    monkeypatch.setattr(app._Lazy, "get_command", lambda *_: app.command(work))
    assert run(["jobs"]) == code
    assert done == list(told)
