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


@pytest.mark.parametrize("where", BLOCKED)
def test_one_interrupt_ends_a_run(where: str, vm_dir: Path) -> None:
    what = BLOCKED[where]
    chosen = "test_blocking" if "blocking." in what else "test_it"
    words = (what, "pass") if chosen == "test_it" else ("pass", what)
    (vm_dir / "test_it.py").write_text(TEST.format(*words))
    (vm_dir / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", chosen]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
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
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - began < 30
    assert process.returncode == 2, said
    assert "KeyboardInterrupt" in said
    assert not Path(f"/proc/{pid}").exists()
    assert list((vm_dir / "t").iterdir()) == []
