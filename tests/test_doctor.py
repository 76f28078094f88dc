"""What `qmpblock doctor` finds on a host that lacks something; VMs are in tests/live."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from qmpblock.cli import doctor_command
from qmpblock.doctor import examine_host

SCHEMA = Path(__file__).parents[1] / "docs" / "schema" / "doctor.schema.json"


def find(what):
    [found] = [one for one in examine_host() if one.what == what]
    assert bool(found.remedy) is found.missing
    assert found.needed_for
    return found


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Return the only directory in which programs are looked for; nothing is in it."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Return the state directory, which is not there yet."""
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "above" / "state"))
    (tmp_path / "above").mkdir(mode=0o755)
    return tmp_path / "above" / "state"


def test_a_program_that_is_not_there(programs):
    assert find("qemu-img").missing
    assert "qemu-utils" in find("qemu-io").remedy


def test_a_qemu_nbd_says_its_version_in_its_own_way(programs):
    (programs / "qemu-nbd").write_text("#!/bin/sh\necho 'qemu-nbd 7.2.22 (Debian 1:7.2)'\n")
    (programs / "qemu-nbd").chmod(0o755)
    found = find("qemu-nbd")
    assert (found.missing, found.found.split(",")[0]) == (False, "qemu-nbd 7.2.22")


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("qemu-img version 6.2.0 (Debian 1:6.2)", True),
        ("qemu-img version 7.2.0", False),
        ("qemu-img version 11.1.2", False),
        ("hello", True),
    ],
)
def test_the_version_of_a_program(programs, said, missing):
    (programs / "qemu-img").write_text(f"#!/bin/sh\necho '{said}'\n")
    (programs / "qemu-img").chmod(0o755)
    assert find("qemu-img").missing is missing


def test_a_program_that_cannot_be_run(programs):
    (programs / "qemu-img").write_text("#!/nonexistent/interpreter\n")
    (programs / "qemu-img").chmod(0o755)
    assert "cannot be run" in find("qemu-img").found


def test_a_state_directory_that_is_not_there_yet(state):
    found = find("state directory")
    assert not found.missing
    assert "not there yet" in found.found


@pytest.mark.parametrize(
    ("mode", "missing"), [(0o700, False), (0o755, False), (0o777, True), (0o707, True)]
)
def test_the_rights_of_the_state_directory(state, mode, missing):
    state.mkdir()
    state.chmod(mode)
    assert find("state directory").missing is missing


@pytest.mark.parametrize(("mode", "missing"), [(0o755, False), (0o757, True), (0o1777, False)])
def test_the_rights_of_what_is_above_the_state_directory(state, mode, missing):
    state.mkdir(mode=0o700)
    state.parent.chmod(mode)
    assert find("state directory").missing is missing


def test_a_state_directory_of_another_user(state):
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    assert "belongs to" in find("state directory").found
    os.chown(state, 0, 65534)
    state.chmod(0o770)
    assert "is writable for others" in find("state directory").found


def test_a_state_directory_that_is_none(state):
    state.write_text("")
    assert "is no directory" in find("state directory").found


@pytest.mark.parametrize(
    ("mode", "missing"), [(0o700, False), (0o755, False), (0o777, True), (0o1777, False)]
)
def test_the_temporary_directory(tmp_path, monkeypatch, mode, missing):
    (tmp_path / "t").mkdir()
    (tmp_path / "t").chmod(mode)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    assert find("temporary directory").missing is missing


def ran(*arguments):
    done = CliRunner().invoke(doctor_command.command, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    return done.return_value, done.stdout


def test_the_command_says_what_is_missing(programs, state):
    code, printed = ran()
    assert code == 4
    lines = printed.splitlines()
    assert lines[0].split()[:2] == ["missing", "qemu-img"]
    assert "needed for: map of an image" in lines[1]
    assert "remedy: install" in lines[2]


def test_a_monitor_that_cannot_be_reached(tmp_path):
    code, printed = ran(str(tmp_path / "nobody"), "--json")
    assert code == 3
    found = json.loads(printed)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    assert found[-1]["what"] == "monitor"
    assert found[-1]["missing"]
