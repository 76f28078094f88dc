"""The examples of docs/export.md, with the real tools: what they restore is the disk as it was."""

import asyncio
import os
import shlex
import sys
from pathlib import Path

import pytest
from fleecing import MIB, SPEC, begin_writing
from pointing import DISKS, SHOWN, at_ease
from unpacked import started

from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import check_point_in_time

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
TOOLS = ("restic", "borg")


def example(tool):
    text = (ROOT / "docs/export.md").read_text()
    return text.partition(f"\n```sh run={tool}\n")[2].partition("\n```\n")[0]


@pytest.mark.parametrize("tool", TOOLS)
async def test_a_backup_tool(tool, start_qemu, vm_dir, invariant, in_memory):
    script, why = started(tool, f"usr/bin/{tool}")
    if script is None:
        pytest.skip(why)
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    site = vm_dir / "site"
    site.mkdir()
    (site / "vm.qmp").symlink_to(vm.monitor_path)
    ours = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qmpblock "$@"\n'
    for name, text in (("qmpblock", ours), (tool, script)):
        program = site / name
        program.write_text(text)
        program.chmod(0o755)
    own = {"HOME": str(site), "XDG_CACHE_HOME": str(site), "BORG_BASE_DIR": str(site)}
    paths = {"PATH": f"{site}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    async with vm.guest.bounds(0) as bounds:
        shell = await asyncio.create_subprocess_exec(
            *(
                "sh",
                "-exc",
                example(tool).replace(" --stdin ", f" --stdin --fleece {in_memory} ", 1),
            ),
            cwd=site,
            env={**os.environ, **own, **paths},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await shell.communicate()
    assert shell.returncode == 0, out.decode()
    data = (site / "restored.raw").read_bytes()
    assert len(data) == 18 * MIB
    found = check_point_in_time(data[: 16 * MIB], SPEC, bounds[0])
    assert found.ok, found
    assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    await at_ease(vm)
