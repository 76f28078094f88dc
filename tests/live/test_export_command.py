"""`qmpblock export` on a living QEMU, run as a program."""

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours, until
from fleecing import MIB, SPEC, begin_writing
from jsonschema import Draft202012Validator
from pointing import DISKS, SHOWN, STEPS, TWO, at_ease, written

from qmpblock.host.processes import start_time
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import Taken, check_one_instant, check_point_in_time

pytestmark = pytest.mark.live

SCHEMA = Path(__file__).parents[2] / "docs/schema/export.schema.json"
#: It says that it has begun, by what it says of itself, and goes on when it is told to.
BEGIN = "echo $$ $NBD_URI > begun.new; mv begun.new begun; until test -e go; do sleep 0.02; done; "


class Running:
    """A command that is under way, in a directory of its own."""

    def __init__(self, process, directory):
        self.process, self.directory = process, directory

    async def begun(self):
        """Wait until it has; return its pid and what `NBD_URI` is."""
        begun = self.directory / "begun"
        await until(begun.exists, "the command")
        pid, uri = begun.read_text().split()
        return int(pid), uri

    async def ends(self):
        """Let it go on; return exit code, stdout and stderr."""
        (self.directory / "go").touch()
        out, err = await self.process.communicate()
        return self.process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def exporting(vm, directory, *words, script):
    """Run `qmpblock export` in a directory; yields it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "export", vm.monitor_path, *words),
        *("--", "sh", "-c", BEGIN + script),
        cwd=directory,
        start_new_session=True,  # with no terminal: whoever runs the tests may have one
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield Running(process, directory)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize(
    ("options", "script"),
    [
        (("--json",), 'nbdcopy "$NBD_URI" copy; echo said'),
        (("--json", "--stdin"), "cat > copy; echo said"),
    ],
    ids=["nbd", "stdin"],
)
async def test_a_command_reads_the_disk_as_it_was(
    options, script, start_qemu, vm_dir, invariant, in_memory
):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    async with AsyncExitStack() as stack:
        async with vm.guest.bounds(0) as bounds:
            running = exporting(vm, vm_dir, "vd0", "--fleece", in_memory, *options, script=script)
            command = await stack.enter_async_context(running)
            await command.begun()
        await written(vm, 2000)
        code, out, err = await command.ends()
    assert code == 0, err
    assert err == "said\n"
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    assert (told["exit_code"], told["whole"], told["disks"][0]["size"]) == (0, True, 18 * MIB)
    assert told["sent"] == (18 * MIB if "--stdin" in options else None)
    data = (vm_dir / "copy").read_bytes()
    assert len(data) == 18 * MIB
    found = check_point_in_time(data[: 16 * MIB], SPEC, bounds[0])
    assert found.ok, found
    assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    await at_ease(vm)


async def test_two_disks_at_one_instant(start_qemu, vm_dir, invariant, in_memory):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    specs = await vm.guest.stress_in_step(*STEPS)
    await written(vm, 500)
    script = (
        'test "$NBD_URI" = "$NBD_URI_1"; nbdcopy "$NBD_URI_1" copy0; nbdcopy "$NBD_URI_2" copy1'
    )
    async with AsyncExitStack() as stack:
        async with vm.guest.bounds(0, 1) as bounds:
            words = ("vd0", "vd1", "--fleece", in_memory)
            running = exporting(vm, vm_dir, *words, script="set -e; " + script)
            command = await stack.enter_async_context(running)
            await command.begun()
        await written(vm, 500)
        code, out, err = await command.ends()
    assert (code, out) == (0, ""), err
    copies = [(vm_dir / f"copy{number}").read_bytes() for number in range(2)]
    result = check_one_instant(
        {
            str(spec.disk): Taken(copy[: spec.length], spec, bounds[spec.disk])
            for spec, copy in zip(specs, copies, strict=True)
        }
    )
    assert result.ok, str(result)
    await at_ease(vm, *specs)


@pytest.mark.parametrize("way", ["nbd", "stdin"])
async def test_a_point_that_ends_is_told_whatever_the_command_says(
    way, start_qemu, vm_dir, invariant, in_memory
):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await vm.guest.fill(0, 0, 8 * MIB, 0x11)
    stdin = ("--stdin",) if way == "stdin" else ()
    script = "cat > copy; touch done; exit 0" if stdin else "exit 0"
    words = ("vd0", "--fleece", in_memory, "--fleece-limit", "5M", *stdin)
    async with exporting(vm, vm_dir, *words, script=script) as command:
        await command.begun()
        await vm.guest.fill(0, 0, 8 * MIB, 0x22)  # more than can be kept of what was there
        code, out, err = await command.ends()
    assert (code, out) == (1, ""), err
    assert "do not rely on what" in err
    said = "could not be read to its end" if stdin else "the point in time of vd0 has ended"
    assert said in err
    assert not (vm_dir / "done").exists()
    await nothing_of_ours(vm)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
@pytest.mark.parametrize("takes", [True, False], ids=["taken", "not-taken"])
async def test_signals_are_the_commands(number, takes, start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"))
    read = 'nbdinfo --size "$NBD_URI"; exit 9'  # it has what it had, until it has ended
    trap = f"trap '{read}' {number.name[3:]}; " if takes else ""
    script = f"{trap}touch up; while :; do sleep 0.02; done"
    async with exporting(vm, vm_dir, "vd0", script=script) as command:
        (vm_dir / "go").touch()
        await until((vm_dir / "up").exists, "the trap")
        command.process.send_signal(number)
        code, out, err = await command.ends()
    assert (code, out) == ((9, f"{18 * MIB}\n") if takes else (128 + number, "")), err
    await nothing_of_ours(vm)


@pytest.mark.parametrize(
    ("words", "wanted", "said"),
    [
        (["--", "sh", "-c", "exit 7"], 7, ""),
        (["--", "sh", "-c", "kill -9 $$"], 137, ""),
        (["--", "no-such-program"], 127, "is no program no-such-program\n  nothing was touched"),
        (["--", "/etc/passwd"], 126, "/etc/passwd cannot be run\n  nothing was touched"),
        (["--stdin", "--", "sh", "-c", "head -c 1M > /dev/null"], 0, "sh took no more than "),
    ],
    ids=["failed", "killed", "none", "not-run", "enough"],
)
async def test_exit_codes(words, wanted, said, start_qemu, invariant):
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"))
    code, _, err = await cli("export", vm.monitor_path, "vd0", *words)
    assert code == wanted, err
    assert said in err
    assert bool(err) == bool(said)
    await nothing_of_ours(vm)


async def test_killed_it_takes_the_command_along(start_qemu, vm_dir, invariant, in_memory):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    async with exporting(
        vm, vm_dir, "vd0", "--stdin", "--fleece", in_memory, script="touch done"
    ) as command:
        pid, _ = await command.begun()
        start = start_time(pid)
        command.process.kill()
        await command.process.communicate()

        def gone():
            return start_time(pid) != start

        await until(gone, "the end of the command")
    assert not (vm_dir / "done").exists()
    assert await vm.execute("query-block-exports") != []
    code, out, err = await cli("recover", vm.monitor_path)
    assert code == 0, out + err
    await at_ease(vm)
