"""Runs that an interrupted playbook left: told by the command's words, ended only if its own."""

import fcntl
import os
import subprocess
import sys

import pytest
from collections_of_ansible import part

from qmpblock.backups.directory import open_backups
from qmpblock.errors import BusyError, MonitorHeldError
from qmpblock.host.processes import describe_process
from qmpblock.names import BACKUP_LOCK_FILE
from qmpblock.qemu.lock import Holder

runs = part("module_utils.runs")

PROGRAM = f"#!{sys.executable}\nprint('ready', flush=True)\nimport signal\nsignal.pause()\n"


@pytest.fixture
def start(tmp_path):
    """Return what starts a process that is called qmpblock, or by another name."""
    started = []

    def begin(*, name="qmpblock", by_ansible=True):
        program = tmp_path / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
        mark = runs.MARK if by_ansible else {}
        process = subprocess.Popen(
            [program, "apply", "p.yaml"], env={**os.environ, **mark}, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def held_by(process):
    """Return what the command says of what a process holds: a monitor, a lock, a directory."""
    monitor = MonitorHeldError(
        "no greeting: it serves one client at a time, and that is " + describe_process(process.pid)
    )
    holder = Holder("r", os.uname().nodename, process.pid, 1, "b", "p", {})
    lock = BusyError(f"another controller holds qmpblock-x-lock in this VM: {holder}")
    return [(3, str(monitor)), (1, str(lock))]


def directory_of(process, place, host):
    """Return what the command says of a directory of backups where a process makes one."""
    file = place / BACKUP_LOCK_FILE
    file.write_text(f"{process.pid} on {host}\n")
    with file.open() as held, open_backups(place) as there:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BusyError) as busy, there.locked():
            pass
    return 1, str(busy.value)


def test_it_is_found_by_what_the_command_says(start, tmp_path):
    process = start()
    held = [*held_by(process), directory_of(process, tmp_path, os.uname().nodename)]
    for code, complaint in held:
        (found,) = runs.in_the_way(code, complaint)
        assert found.pid == process.pid
        assert found.by_ansible
        assert found.is_there()
        assert "apply p.yaml" in str(found)
        assert str(process.pid) in runs.said([found])[0]


def test_another_hosts_process_is_none_of_this_one(start, tmp_path):
    """Its directory of backups may be a share; this process has the same number by chance."""
    assert runs.in_the_way(*directory_of(start(), tmp_path, "elsewhere.example")) == []


@pytest.mark.parametrize("code", [0, 2, 130])
def test_what_failed_otherwise_was_not_in_its_way(code, start):
    process = start()
    assert runs.in_the_way(code, held_by(process)[0][1]) == []
    assert runs.in_the_way(1, f"QEMU refused it: process {process.pid}") == []


def test_what_is_no_qmpblock_is_none_of_ours(start):
    process = start(name="virsh")
    assert runs.look(process.pid) is None


def test_one_that_is_gone(start):
    process = start()
    found = runs.look(process.pid)
    process.kill()
    process.wait()
    assert not found.is_there()
    assert runs.look(process.pid) is None
    assert runs.end([found]) == [found]


def test_only_what_a_playbook_began_is_ended(start):
    mine, theirs = start(), start(by_ansible=False)
    found = [runs.look(process.pid) for process in (mine, theirs)]
    assert [one.by_ansible for one in found] == [True, False]
    assert runs.said(found[1:]) == []
    assert [one.pid for one in runs.end(found)] == [mine.pid]
    assert mine.wait() == -15
    assert theirs.poll() is None
