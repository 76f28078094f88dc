"""Every command against monitors that lie, many times: `make soak`."""

import pytest
from lying import COMMANDS, case, check
from rounds import rounds

pytestmark = pytest.mark.soak


def test_no_command_ends_in_a_traceback_whatever_qemu_says(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    count, chance = rounds(200)
    for _ in range(count):
        check(chance.choice(COMMANDS), case(chance), tmp_path, monkeypatch)
