"""The measurements of copies run, and say what they say, at a small scale."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
WAYS = {
    "copy --at start",
    "copy --at end",
    "the command",
    "nbdcopy",
    "qemu-img convert -W",
    "blockdev-backup",
    "blockdev-mirror",
}
FELT = {"idle", *(name + slow for name in WAYS for slow in ("", ", slow target"))}


async def test_copies_are_measured(vm_dir):
    words = ["--mib", "4", "--rounds", "1", "--seconds", "1", "--folder", str(vm_dir), "--json"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.copy", *words),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["mib"] == 4
    for kind in ("in one piece", "scattered"):
        for fmt in ("raw", "qcow2"):
            taken = told["seconds"][kind][fmt]
            assert set(taken) == WAYS
            assert all(len(times) == 1 and min(times[0]) > 0 for times in taken.values())
    assert set(told["latency"]) <= FELT
    assert len(told["latency"]) == 7
    for one in told["latency"].values():
        assert one["errors"] == 0
        assert 0 < one["median"] <= one["p99"] <= one["longest"]
    assert not list(vm_dir.glob("qmpblock-bench-*"))
