"""What a command does to files, as the kernel saw it: nothing by a path that others could bend.

In the directory of an image anybody may put a link into any place at any time, if it is QEMU's
user or shares a group with it. So what root makes, opens for writing, changes or removes there
goes by a descriptor. tests/tracing.py says what is allowed. Each beside a QEMU of root's own, and
beside one of a user who is not to be trusted.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from otherusers import EVE
from tracing import STRACE, Judge, calls_of

import qmpblock
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

CHAIN = """
about: Two layers with data in the lower one.
images:
  - {format: qcow2, size: 4M, content: [write 0 64K 0xaa]}
  - {size: 4M, content: [write 2M 64K 0xbb]}
"""
RAW = """
about: A raw image with blanks.
images:
  - {format: raw, size: 4M, content: [write 0 64K 0xaa]}
"""


@pytest.fixture
def traced(vm_dir):
    """Give a function that runs a command under strace and returns it with what is wrong."""
    if os.geteuid() != 0:
        pytest.skip("this is about what root does")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace may not trace here")
    (vm_dir / "traces").mkdir()

    async def run(*arguments, home):
        prefix = vm_dir / "traces" / arguments[0]
        process = await asyncio.create_subprocess_exec(
            *(*STRACE, "-o", str(prefix), sys.executable, "-B", "-m", "qmpblock", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
        calls = calls_of(prefix)
        judge = Judge(
            Path(os.environ["QMPBLOCK_STATE"]).resolve(),
            [home.resolve()],
            Path(os.environ["TMPDIR"]).resolve(),
            Path(qmpblock.__file__).resolve().parent,
        )
        wrong = [complaint for call in calls if (complaint := judge.complaint(call))]
        assert calls, "nothing was traced"
        return process.returncode, printed.decode(), wrong

    return run


@pytest.fixture(params=["root", "Eve"])
def start(request, start_qemu, invariant, eve):
    """Give a function that starts the QEMU of a scenario, whose disk may change."""

    async def run(text):
        scenario = parse_scenario(text, "traced")
        if request.param == "Eve":
            vm = await eve.start(scenario)
            assert Path(f"/proc/{vm.pid}").stat().st_uid == EVE
            return vm
        vm = await start_qemu(scenario)
        invariant.forget(vm)
        return vm

    return run


def active(vm):
    return vm.disks[0].active.path


async def test_allocate_full_by_an_overlay(traced, start):
    vm = await start(CHAIN)
    code, printed, wrong = await traced(
        "allocate", vm.monitor_path, "vd0", "--full", home=active(vm).parent
    )
    assert (code, wrong) == (0, []), printed + "\n".join(wrong)


async def test_allocate_full_of_a_raw_image(traced, start):
    vm = await start(RAW)
    code, printed, wrong = await traced(
        "allocate", vm.monitor_path, "vd0", "--full", home=active(vm).parent
    )
    assert (code, wrong) == (0, []), printed + "\n".join(wrong)


async def test_snapshot_and_commit(traced, start):
    vm = await start(CHAIN)
    home = active(vm).parent
    code, printed, wrong = await traced(
        "snapshot", vm.monitor_path, f"vd0={home}/overlay", home=home
    )
    assert (code, wrong) == (0, []), printed + "\n".join(wrong)
    code, printed, wrong = await traced("commit", vm.monitor_path, "vd0", home=home)
    assert (code, wrong) == (0, []), printed + "\n".join(wrong)


async def test_recover_of_an_image_that_both_have_left(traced, start):
    """QEMU and its controller die in the middle; the overlay is brought home."""
    vm = await start(CHAIN)
    image = active(vm)
    controller = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "allocate", vm.monitor_path, "vd0"),
        *("--full", "--speed", "64K"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(60):
        while not await _is_written_to(vm, image):
            await asyncio.sleep(0.01)
    await vm.qemu_io("d0", "write -P 0x55 3M 64k")
    await vm.qemu_io("d0", "flush")
    controller.kill()
    await controller.wait()
    await vm.kill()
    code, printed, wrong = await traced("recover", str(image), home=image.parent)
    assert (code, wrong) == (0, []), printed + "\n".join(wrong)
    assert "qmpblock-" not in " ".join(os.listdir(image.parent))
    read = ["qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x55 3M 64k", str(image)]
    await asyncio.to_thread(subprocess.run, read, check=True, stdout=subprocess.DEVNULL)


async def _is_written_to(vm, image):
    """Whether the disk's active image is an overlay of ours."""
    [block] = await vm.execute("query-block")
    return f"{image.name}.qmpblock-" in block["inserted"]["file"]
