"""What is said of a monitor that a run of ours holds."""

import os

import pytest

from qmpblock.changes.held import tell_of_our_own
from qmpblock.changes.journal import Journal
from qmpblock.changes.operations import Commit
from qmpblock.changes.record import VMIdentity
from qmpblock.errors import MonitorHeldError


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))


def journal(monitor):
    identity = VMIdentity("", "unknown", 1, 1, "boot", monitor)
    record = Commit("0123abcd", identity, ("/machine/x",), ("vd0",), (), images=("/i/a",))
    return Journal.create(record)


def test_what_its_journal_says(tmp_path):
    journal(f"unix:{tmp_path}/q")
    error = MonitorHeldError("held", (os.getpid(),), remedy="a second monitor")
    tell_of_our_own(error, f"{tmp_path}/q")
    assert "commit of vd0 (run 0123abcd)" in error.standing
    assert error.remedy == "a second monitor"  # this process is not the command: nobody ends it


def test_another_monitors_journal_is_no_word_of_it(tmp_path):
    journal(f"unix:{tmp_path}/other")
    error = MonitorHeldError("held", (os.getpid(),), remedy="a second monitor")
    tell_of_our_own(error, f"{tmp_path}/q")
    assert error.standing == "nothing was touched"


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (("/usr/bin/qmpblock", "map", "q"), True),
        (("/usr/bin/python3", "/usr/bin/qmpblock", "map"), True),
        (("python3", "-m", "qmpblock", "map"), True),
        (("/usr/sbin/libvirtd",), False),
        (("vim", "-R", "notes", "qmpblock"), False),
    ],
)
def test_only_the_command_is_ended(tmp_path, monkeypatch, words, ours):
    monkeypatch.setattr("qmpblock.changes.held.command_line", lambda pid: words)
    error = MonitorHeldError("held", (17,), remedy="a second monitor")
    tell_of_our_own(error, f"{tmp_path}/q")
    assert ("kill -INT 17" in error.remedy) == ours
