"""qmpblock metrics: its words, and VMs that are not there."""

import builtins
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qmpblock.cli.app import run

SCHEMA = Path(__file__).parents[2] / "docs/schema/metrics.schema.json"


def test_who_is_not_there_is_told_of(capsys, tmp_path):
    file = tmp_path / "f.prom"
    assert run(["metrics", "/nosuch/a", "/nosuch/b", "/nosuch/a"]) == 4
    captured = capsys.readouterr()
    assert captured.out.count("\nqmpblock_up{") == 2
    assert 'qmpblock_up{vm="/nosuch/b"} 0.0\n' in captured.out
    assert captured.err.count("cannot connect to unix:/nosuch/") == 2
    assert run(["metrics", "/nosuch/a", "--textfile", str(file), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    assert [(one["address"], one["up"]) for one in found["vms"]] == [("/nosuch/a", False)]
    assert 'qmpblock_up{vm="/nosuch/a"} 0.0\n' in file.read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "ADDRESS"),
        (["tcp:nowhere"], 4, "tcp:nowhere"),
        (["/nosuch/a", "--textfile", "/nosuch/f"], 1, "cannot write /nosuch/f"),
    ],
)
def test_what_is_wrong_is_said(words, code, said, capsys):
    assert run(["metrics", *words]) == code
    assert said in capsys.readouterr().err


def test_without_the_library_nobody_is_asked(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        assert run(["metrics", "/nosuch/a"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "qmpblock[metrics]" in captured.err
        assert "/nosuch/a" not in captured.err
        assert run(["metrics", "/nosuch/a", "--json"]) == 4
