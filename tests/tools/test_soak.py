"""tools/soak.py: rounds are counted in slices, survive an interruption, and have a seed."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "soak.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


soak = load()


@pytest.fixture
def qemu(tmp_path: Path) -> str:
    """Something that has a version; no machine is started here."""
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 9.9.9\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a project whose one soak test writes down its slices, and fails at the round FAIL_AT."""
    root = tmp_path / "project"
    (root / "tests" / "soak").mkdir(parents=True)
    (root / "tests" / "live").mkdir()
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n  soak\n  live\n")
    (root / "tests" / "live" / "test_live.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.live\n"
        "def test_live():\n"
        "    assert os.environ['QMPBLOCK_SLICE']\n"
    )
    (root / "tests" / "soak" / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.soak\n"
        "def test_it():\n"
        "    rounds, seed = os.environ['QMPBLOCK_ROUNDS'], os.environ['QMPBLOCK_SEED']\n"
        "    assert seed != os.environ.get('FAIL_AT')\n"
        "    with open(os.environ['SLICES'], 'a') as file:\n"
        "        print(rounds, seed, os.environ['QMPBLOCK_SOAK'], file=file)\n"
    )
    written = tmp_path / "slices"
    monkeypatch.setattr(soak, "ROOT", root)
    monkeypatch.setenv("SLICES", str(written))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return written


def test_a_run_that_failed_goes_on_where_it_was(
    tmp_path: Path,
    qemu: str,
    slices: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record = tmp_path / "state" / "soak.json"
    words = ["--rounds", "10", "--slice", "4", "--qemu", qemu, "--record", str(record)]
    monkeypatch.setenv("FAIL_AT", "104")
    assert soak.main([*words, "--seed", "100"]) == 1
    assert "QMPBLOCK_ROUNDS=4 QMPBLOCK_SEED=104" in capfd.readouterr().out
    assert json.loads(record.read_text())["rounds"] == 4
    monkeypatch.delenv("FAIL_AT")
    assert soak.main(words) == 0
    assert slices.read_text().splitlines() == ["4 100 full", "4 104 full", "2 108 full"]
    assert "10 rounds passed, seed 100" in capfd.readouterr().out
    assert os.listdir(record.parent) == ["soak.json"]


def test_other_code_starts_anew(tmp_path: Path, qemu: str, slices: Path) -> None:
    record = tmp_path / "soak.json"
    soak.save(record, soak.subject(qemu), {"rounds": 7, "seed": 3})
    assert soak.load(record, soak.subject(qemu)) == {"rounds": 7, "seed": 3}
    test = slices.parent / "project" / "tests" / "soak" / "test_it.py"
    test.write_text(test.read_text() + "\n")
    assert soak.load(record, soak.subject(qemu))["rounds"] == 0


def test_a_torn_record_is_no_record(tmp_path: Path) -> None:
    record = tmp_path / "soak.json"
    record.write_text('{"about": "x", "rou')
    assert soak.load(record, "x")["rounds"] == 0


def test_the_script_runs() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert "--rounds" in done.stdout
