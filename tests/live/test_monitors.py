"""Monitors as people have them: pretty, held by somebody, with a queue that is full."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys

import pytest
from chains import cli

import qmpblock
from qmpblock.errors import MonitorHeldError

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")


async def run(*arguments, code=0):
    returned, out, err = await cli(*map(str, arguments))
    assert returned == code, err
    return out, err


@CHAIN
async def test_a_pretty_monitor(scenario, start_qemu, invariant, vm_dir):
    """Its messages take many lines each; descriptors and events pass as by any other."""
    path = str(vm_dir / "pretty.qmp")
    vm = await start_qemu(scenario, extra=["-qmp-pretty", f"unix:{path},server=on,wait=off"])
    plain, _ = await run("map", vm.monitor_path, "d0", "--json")
    assert json.loads((await run("map", path, "d0", "--json"))[0]) == json.loads(plain)
    async with qmpblock.connect(path) as controller:
        disk = await controller.disk("d0")
        assert (await disk.allocate()).allocated > 0
        with controller.monitor.subscribe("STOP") as stopped:
            await controller.monitor.execute("stop")
            assert (await stopped.get(10))["event"] == "STOP"
            assert await controller.monitor.execute("cont") == {}


@CHAIN
async def test_a_run_of_ours_holds_it(scenario, start_qemu, invariant):
    """Who asks is told which process it is, what it does, and how to end it; all that is true."""
    vm = await start_qemu(scenario)
    path = str(vm.monitor_path)
    job = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "stream", path, "d0", "--speed", "1"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    while not await vm.execute("query-jobs"):
        await asyncio.sleep(0.01)
    asked = [run("disks", path, code=3), run("job", path, "x", "cancel", code=3)]
    for _, err in await asyncio.gather(*asked):
        assert f"process {job.pid} (" in err
        assert f"qmpblock stream {path} d0" in err
        assert "stream of vd0 (run " in err
        assert "libvirt, say" not in err
        assert f"kill -INT {job.pid}" in err
    with pytest.raises(MonitorHeldError) as caught:
        async with qmpblock.connect(path, greeting_timeout=0.2):
            pass
    assert caught.value.holders == (job.pid,)
    os.kill(job.pid, signal.SIGINT)
    await job.communicate()
    assert job.returncode == 130
    await run("disks", path)


@CHAIN
async def test_somebody_else_holds_it(scenario, start_qemu, invariant):
    """It is named, and nobody is told to end it."""
    vm = await start_qemu(scenario)
    code = (
        "import socket,sys; s=socket.socket(1); s.connect(sys.argv[1]); s.recv(9)\n"
        "print(flush=True); input()"
    )
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, vm.monitor_path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    await other.stdout.readline()
    try:
        with pytest.raises(MonitorHeldError, match=f"process {other.pid} ") as caught:
            async with qmpblock.connect(vm.monitor_path, greeting_timeout=0.2):
                pass
        assert "kill" not in caught.value.remedy
        assert "-qmp unix:" in caught.value.remedy
    finally:
        await other.communicate(b"\n")


@CHAIN
async def test_its_queue_is_full(scenario, start_qemu, invariant):
    """So many wait that not one more may: that is said, and it is waited for."""
    vm = await start_qemu(scenario)
    with contextlib.ExitStack() as others:
        held = others.enter_context(socket.socket(socket.AF_UNIX))
        held.connect(str(vm.monitor_path))
        await asyncio.to_thread(held.recv, 1)  # QEMU has taken it out of its queue
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(vm.monitor_path))
        with pytest.raises(MonitorHeldError, match=r"queue is full.*this very process") as caught:
            async with qmpblock.connect(vm.monitor_path, greeting_timeout=0.3):
                pass
        assert caught.value.exit_code == 3
        assert caught.value.holders == (os.getpid(),)
        waiting = asyncio.create_task(first_version(vm.monitor_path))
        await asyncio.sleep(0.2)
    assert await waiting == vm.version


async def first_version(path):
    async with qmpblock.connect(path) as controller:
        return controller.monitor.version
