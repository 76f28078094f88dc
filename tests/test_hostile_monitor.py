"""No command ends in a traceback, whatever QEMU says; a sample by chance, many in `make soak`."""

import pytest
from lying import COMMANDS, case, check
from rounds import rounds


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_ends_in_a_traceback_whatever_qemu_says(command, tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    _, chance = rounds(1)
    for _ in range(6):
        check(command, case(chance), tmp_path, monkeypatch)
