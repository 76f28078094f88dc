"""Which VMs are listed: those that run when they have been asked."""

import os
import subprocess

import pytest

from qmpblock.host.processes import command_line
from qmpblock.inventory import listing
from qmpblock.inventory.commandline import Started
from qmpblock.inventory.processes import QEMU


@pytest.mark.parametrize("runs", [True, False])
async def test_one_that_ends_while_it_is_asked_is_not_there(runs, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    pid = os.getpid() if runs else ended.pid
    words = command_line(os.getpid()) if runs else ("true",)
    one = QEMU(pid, 0, "root", words, Started("web"))
    with monkeypatch.context() as patch:
        patch.setattr(listing, "qemus", lambda: [one])
        found = await listing.vms()
    assert [vm.name for vm in found] == (["web"] if runs else [])
    assert all(vm.trouble for vm in found)
