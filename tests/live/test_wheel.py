"""The package as a user has it: the command at a real QEMU, and the pytest plugin."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from wheels import install

import qmpblock

pytestmark = pytest.mark.live

TESTING = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.mark.scenarios("chain-3.yaml")
async def test_it_works_without_the_repository(scenario, start_qemu, tmp_path):
    installed = await asyncio.to_thread(install, tmp_path)
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        wanted = (await disk.map()).to_qemu_img()

    async def run(*words):
        return await asyncio.to_thread(installed.run, *words)

    [found] = json.loads(await run("qmpblock", "disks", vm.monitor_path, "--json"))
    assert [layer["file"] for layer in found["layers"]] == [one.file for one in disk.chain.layers]
    assert json.loads(await run("qmpblock", "map", vm.monitor_path, disk.name, "--json")) == wanted

    for name, text in re.findall(r"```\w+ title=(\S+)\n(.*?)```", TESTING.read_text(), re.DOTALL):
        path = installed.elsewhere / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    said = await run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "2 passed" in said
