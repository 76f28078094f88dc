"""One Ctrl-C ends a run, whatever a test is doing, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BLOCKED = {
    "in Python": "time.sleep(600)",
    "in the kernel": "os.read(os.pipe()[0], 1)",
    "in another process": "subprocess.run(['sleep', '600'])",
    "in a thread": "threading.Event().wait()",
    "in the loop": "await asyncio.sleep(600)",
    "in the guest": "await vm.execute('stop'); vm.guest.console.run_state = None; "
    "await vm.guest.flush(0, stall=600)",
    "in another thread of the loop": "await asyncio.to_thread(time.sleep, 5)",
    "in a blocking call": "blocking.guest.console._wrapped.run_state = None; "
    "blocking.execute('stop'); blocking.guest.flush(0, stall=600)",
}
TEST = """
import asyncio, os, subprocess, threading, time
from qmpblock.testing import parse_scenario

ONE = parse_scenario("about: One.\\nimages: [{{size: 8M}}]\\n", "one")

async def test_it(start_qemu, invariant):
    vm = await start_qemu(ONE, guest=True)
    print("pid", vm.pid, flush=True)
    {0}

def test_blocking(start_blocking_qemu):
    blocking = start_blocking_qemu(ONE, guest=True)
    print("pid", blocking.pid, flush=True)
    {1}
"""


SLOW = """
import time
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt():
    time.sleep(4)  # as long as pytest itself takes, on a busy machine, to show where it was
    print("shown")
"""


def test_who_has_obeyed_is_not_interrupted_again(vm_dir: Path) -> None:
    (vm_dir / "conftest.py").write_text(SLOW)
    assert "shown" in interrupted("in the loop", vm_dir)


@pytest.mark.parametrize("where", BLOCKED)
def test_one_interrupt_ends_a_run(where: str, vm_dir: Path) -> None:
    interrupted(where, vm_dir)


def interrupted(where: str, vm_dir: Path) -> str:
    """Interrupt a run once; return what it said."""
    what = BLOCKED[where]
    chosen = "test_blocking" if "blocking." in what else "test_it"
    words = (what, "pass") if chosen == "test_it" else ("pass", what)
    (vm_dir / "test_it.py").write_text(TEST.format(*words))
    (vm_dir / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", chosen]
    kept = "PYTEST_ADDOPTS"  # all else is of the run that this is
    environment = {k: v for k, v in os.environ.items() if k == kept or not k.startswith("PYTEST_")}
    with subprocess.Popen(
        command, cwd=vm_dir, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = ""
        while not line.startswith("pid ") and " pid " not in line:
            line = process.stdout.readline()
            assert line, "it ended by itself"
        pid = int(line.split("pid ")[1])
        time.sleep(0.5)  # now it is blocked
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 2, said
    assert "KeyboardInterrupt" in said
    assert not Path(f"/proc/{pid}").exists()
    assert list((vm_dir / "t").iterdir()) == []
    return said
