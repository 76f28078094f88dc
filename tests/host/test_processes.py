"""Processes that a pid alone would confuse."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from headers_of_eve import give, open_to_all
from otherusers import EVE, User

from qmpblock.errors import UnsupportedError
from qmpblock.host.handed import User as TheirRights
from qmpblock.host.processes import (
    Peer,
    boot_id,
    command_line,
    is_running,
    pid_namespace,
    start_time,
    times_slept,
    users_of,
)

PROGRAM = "print(flush=True); input()"


@pytest.fixture
def sleeper():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()  # until then it is about to become that program
    yield process
    process.kill()
    process.communicate()


def test_this_process_runs():
    start = start_time(os.getpid())
    assert start > 0
    assert is_running(os.getpid(), start, boot_id())


def test_its_command_line(sleeper):
    assert command_line(sleeper.pid) == (sys.executable, "-c", PROGRAM)
    sleeper.kill()
    sleeper.wait()
    assert command_line(sleeper.pid) == ()
    assert command_line(None) == ()


def test_this_host_is_named():
    assert len(boot_id()) == 36
    assert pid_namespace().startswith("pid:[")


def test_it_runs_until_it_ends(sleeper):
    start = start_time(sleeper.pid)
    assert is_running(sleeper.pid, start, boot_id())
    sleeper.kill()
    sleeper.wait()
    assert start_time(sleeper.pid) is None
    assert not is_running(sleeper.pid, start, boot_id())


def test_a_zombie_is_gone(sleeper):
    """Killed, not waited for: a test harness, or a manager that is slow."""
    start = start_time(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{sleeper.pid}").exists()
    assert not is_running(sleeper.pid, start, boot_id())


def test_a_process_whose_first_thread_has_ended_is_not_gone():
    """The kernel calls it a zombie, as one of which nothing is left."""
    code = (
        "import ctypes, os, sys, threading; "
        "threading.Thread(target=lambda: os._exit(len(sys.stdin.read(1)))).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        began = start_time(process.pid)
        stat = Path(f"/proc/{process.pid}/stat")
        while ") Z" not in stat.read_text():
            time.sleep(0.005)
        assert start_time(process.pid) == began
        assert is_running(process.pid, began, boot_id())
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(process.pid) is None


def test_a_pid_used_again_is_another_process():
    start = start_time(os.getpid())
    assert not is_running(os.getpid(), start - 1, boot_id())


def test_after_a_reboot_everything_is_gone():
    """Pid and start time can come again, on a machine that boots the same way every time."""
    assert not is_running(os.getpid(), start_time(os.getpid()), "0" * 36)


@pytest.mark.parametrize("pid", [0, -1])
def test_an_unknown_pid_is_no_process(pid):
    """0 is a TCP monitor's; os.kill would take it for this whole process group."""
    assert not is_running(pid, 0, boot_id())


def test_a_command_name_full_of_traps(tmp_path):
    """The kernel shows it in parentheses, unescaped, in the middle of the line."""
    program = tmp_path / ") Z 1 (x"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o700)
    process = subprocess.Popen([program, "60"])
    try:
        while ") Z 1 (x" not in Path(f"/proc/{process.pid}/stat").read_text():
            os.sched_yield()  # the child is still between fork and exec
        start = start_time(process.pid)
        assert start >= start_time(os.getpid())
        assert is_running(process.pid, start, boot_id())
    finally:
        process.kill()
        process.wait()


def test_how_often_a_thread_has_slept():
    me, thread = os.getpid(), threading.get_native_id()
    before = times_slept(me, thread)
    time.sleep(0.01)
    assert times_slept(me, thread) > before
    assert times_slept(None, thread) is None
    assert times_slept(me, 1 << 30) is None


#: Listens on a socket, then becomes another program, and says when.
BECOMES = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.set_inheritable(listener.fileno(), True)
if os.fork():
    os.execv(sys.argv[2], [sys.argv[2], "60"])
print(flush=True)
os.read(0, 1)
"""


def test_a_peer_is_the_process_that_made_the_socket(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        client.connect(str(tmp_path / "sock"))
        peer = Peer.of(client)
        assert (peer.pid, peer.user) == (os.getpid(), os.geteuid())
        assert peer.known() == os.getpid()
        assert replace(peer, start=peer.start - 1).known() is None  # its number is another's
        if peer.user == 0:
            assert replace(peer, user=61666).known() is None  # it is root's, and was not
    with socket.socket() as unconnected:
        assert Peer.of(unconnected) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a program of root's")
@pytest.mark.parametrize("mode", [0o755, 0o4755])
def test_a_peer_that_has_become_root_is_none(mode):
    """Its user would have had us do everything as root: by any set-user-ID program that waits."""
    with open_to_all() as place, socket.socket(socket.AF_UNIX) as client:
        give(place, EVE, 0o755)
        program = shutil.copy("/bin/sleep", place / "sleep")
        os.chmod(program, mode)
        command = User(EVE).command(sys.executable, "-I", "-S", "-c", BECOMES)
        with subprocess.Popen(
            [*command, str(place / "sock"), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                process.stdout.readline()
                client.connect(str(place / "sock"))
                peer = Peer.of(client)
                assert (peer.pid, peer.user) == (process.pid, EVE)
                while Path(f"/proc/{peer.pid}/comm").read_text() != "sleep\n":
                    time.sleep(0.01)
                if mode == 0o755:
                    assert users_of(peer.pid) == (EVE,)
                    assert peer.known() == process.pid
                    return
                if users_of(peer.pid) == (EVE,):
                    pytest.skip("/tmp is mounted nosuid here")
                assert users_of(peer.pid) == (EVE, 0)
                assert peer.known() is None
                with pytest.raises(UnsupportedError, match="the rights of several users"):
                    TheirRights.of_process(peer.pid)
            finally:
                process.kill()
