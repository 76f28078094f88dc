"""The command line without a VM: exit codes, sizes, start-up."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qmpblock import __version__
from qmpblock.cli.app import Size, run


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


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "qmpblock", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"qmpblock {__version__}\n"


def test_a_command_imports_only_what_it_needs():
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
