"""The walks of docs/architecture.md on a real QEMU: these functions and commands, in this order."""

import asyncio
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import qmpblock

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
READS = ("query-", "qom-get", "qom-list", "x-debug-query-")  # they change nothing
#: Runs a command line, and prints in the end what it called in the package and asked of QEMU.
WATCHED = """
import json, sys
from pathlib import Path
import qmpblock
from qmpblock.cli.app import run
from qmpblock.qemu.monitor import Monitor

package, steps = f"{Path(qmpblock.__file__).parent}/", []
execute, read, each, pass_fd = Monitor.execute, Monitor.read, Monitor.each, Monitor.pass_fd

def called(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package):
        steps.append(f"{code.co_filename.removeprefix(package)}::{code.co_qualname}")

async def executed(self, command, arguments=None):
    steps.append(command)
    return await execute(self, command, arguments)

async def was_read(self, *commands):
    steps.extend(one if isinstance(one, str) else one[0] for one in commands)
    return await read(self, *commands)

async def did_each(self, *commands):
    steps.extend(command for command, _ in commands)
    return await each(self, *commands)

async def passed(self, name, fd):
    steps.append("getfd")
    await pass_fd(self, name, fd)

Monitor.execute, Monitor.read, Monitor.each, Monitor.pass_fd = executed, was_read, did_each, passed
sys.setprofile(called)
code = run(sys.argv[2:])
sys.setprofile(None)
Path(sys.argv[1]).write_text(json.dumps(steps))
sys.exit(code)
"""


@dataclass(frozen=True)
class Told:
    """A walk as the page tells it: the command line; functions and QMP commands, in order."""

    words: list[str]
    steps: list[str]


def told(what):
    """Read the walk of a `what`."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## The walk of a {what}\n")[2]
    line, _, rows = text.partition("\n## ")[0].partition("\n\n|")
    [command] = re.findall(r"`qmpblock ([^`]+)`", line)
    cells = [row.split("|") for row in rows.partition("\n\n")[0].splitlines()[2:]]
    steps = []
    for _, room, happens, asked, _ in cells:
        for cell in (room, happens, asked):
            steps += re.findall(r"`([\w/]+\.py::[\w.]+|[a-z][a-z-]+)`", cell)
    return Told(command.split(), steps)


async def walked(arguments, folder):
    """Run `qmpblock`; return what it called and asked, in order."""
    command = [sys.executable, "-c", WATCHED, folder / "steps", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    assert await asyncio.wait_for(process.wait(), 300) == 0
    return json.loads((folder / "steps").read_text())


def first_missing(wanted, seen):
    """Return what of `wanted` does not come next in `seen`, others between them; None if all do."""
    left = iter(seen)
    return next((step for step in wanted if step not in left), None)


def test_what_is_missing_is_found():
    assert first_missing(["a", "b", "a"], ["a", "x", "b", "y", "a"]) is None
    assert first_missing(["a", "b", "a"], ["a", "b"]) == "a"
    assert first_missing(["b", "a"], ["a", "b"]) == "a"


@pytest.mark.parametrize("what", ["map", "commit"])
async def test_a_walk_is_as_told(what, scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    walk = told(what)
    assert len(walk.steps) > 30
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
    names = {"vm.qmp": vm.monitor_path, "vd0": disk.name}
    steps = await walked([names.get(word, word) for word in walk.words], vm_dir)
    if what == "commit":
        invariant.forget(vm)  # its chain is another one now
    assert first_missing(walk.steps, steps) is None
    asked = [step for step in steps if "::" not in step and not step.startswith(READS)]
    assert asked == [step for step in walk.steps if "::" not in step and not step.startswith(READS)]
