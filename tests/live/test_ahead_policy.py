"""`ahead` in a policy: planned, applied, watched by the command, interrupted and killed."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from chains import cli
from jsonschema import Draft202012Validator
from watching import MIB, alone, armed, built, eventually, locks, past_the_end, watching

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.testing.faults import Controller, fill_up, small_file_system

pytestmark = pytest.mark.live

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
LOCK = "qmpblock-ahead-vd0"


def written(directory, vms):
    """Write a policy file: for each VM its disks."""
    content = {"vms": [{"address": vm.monitor_path, "disks": disks} for vm, disks in vms]}
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def valid(text, name):
    value = json.loads(text)
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    return value["disks"] if name != "recover" else value


def command(*arguments):
    return [sys.executable, "-m", "qmpblock", *arguments]


async def one(start_qemu, vm_dir, qemu_binary, scenario=None, **options):
    images = await built(scenario or alone(), vm_dir / "images", qemu_binary)
    return await start_qemu(images, **options)


async def test_planned_applied_and_nothing_left_to_do(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary)
    file = vm.disks[0].active.path
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "8M"}])])
    code, out, err = await cli("plan", path, "--json")
    assert code == 0, err
    [plan] = valid(out, "plan")
    assert plan["ahead"] == {"wanted": 8 * MIB, "room": 0, "reserve": 8 * MIB, "full": False}
    assert plan["steps"] == []
    code, out, _ = await cli("plan", path)
    assert (code, past_the_end(file)) == (0, 0)
    assert "ahead 8388608" in out
    assert "room ahead of the guest: 0 of 8M, 8M to reserve" in out
    await invariant.verify(vm)

    await invariant.begin(vm)
    size = file.stat().st_size
    code, out, err = await cli("apply", path, "--json")
    assert code == 0, err
    [result] = valid(out, "apply")
    assert (result["state"], result["reserved"], result["watch"]) == ("done", 0, None)
    assert result["ahead"] == {
        "file": str(file),
        "wanted": 8 * MIB,
        "before": 0,
        "reserved": 8 * MIB,
        "room": 8 * MIB,
        "full": False,
    }
    assert (past_the_end(file), file.stat().st_size) == (8 * MIB, size)

    code, out, err = await cli("apply", path, "--json")
    assert code == 0, err
    [result] = valid(out, "apply")
    assert (result["state"], result["ahead"]["reserved"]) == ("nothing", 0)
    assert (result["ahead"]["before"], result["ahead"]["room"]) == (8 * MIB, 8 * MIB)
    code, out, _ = await cli("plan", path)
    assert "nothing to do" in out
    assert "room ahead of the guest: 8M of 8M" in out
    await invariant.verify(vm)


async def test_what_is_reserved_in_full_is_room_already(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary, alone("raw", "16M"))
    half = {"disk": "vd0", "allocation": "full", "ranges": [{"length": "50%"}], "ahead": "75%"}
    path = written(vm_dir, [(vm, [half])])
    code, out, err = await cli("plan", path, "--json")
    assert code == 0, err
    [plan] = valid(out, "plan")
    blank = 16 * MIB - 4096  # qemu-img writes a block of zeros for whoever probes alignment
    assert (plan["reserve"], plan["ahead"]["room"]) == (8 * MIB - 4096, 0)
    assert plan["ahead"]["reserve"] == 4 * MIB + 4096
    code, out, err = await cli("apply", path, "--json")
    assert code == 0, err
    [result] = valid(out, "apply")
    assert (result["reserved"], result["ahead"]["reserved"]) == (8 * MIB - 4096, 4 * MIB + 4096)
    assert (result["ahead"]["room"], result["ahead"]["full"]) == (12 * MIB, False)

    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "100%"}])])
    for expected in (4 * MIB - 4096, 0):
        code, out, err = await cli("apply", path, "--json")
        assert code == 0, err
        [result] = valid(out, "apply")
        assert result["ahead"]["reserved"] == expected
        assert (result["ahead"]["room"], result["ahead"]["full"]) == (blank, True)
    assert result["state"] == "nothing"
    await invariant.verify(vm)


async def test_what_must_stay_free_is_kept_by_plan_and_apply(
    start_qemu, invariant, vm_dir, qemu_binary
):
    vm = await one(start_qemu, vm_dir, qemu_binary)
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "8M", "keep_free": "100%"}])])
    for verb in ("plan", "apply"):
        code, out, _ = await cli(verb, path, "--json")
        [disk] = valid(out, verb)
        assert code == 1
        assert "the policy keeps" in disk["error"]
    assert past_the_end(vm.disks[0].active.path) == 0
    await invariant.verify(vm)


async def test_nothing_to_watch_is_a_wrong_request(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary, alone("raw", "16M"))
    path = written(vm_dir, [(vm, [{"disk": "vd0", "allocation": "full"}])])
    blocks = vm.disks[0].active.path.stat().st_blocks
    code, out, err = await cli("apply", path, "--watch", "--json")
    assert (code, out) == (2, "")
    assert "no disk has `ahead`" in err
    assert "nothing was touched" in err
    assert vm.disks[0].active.path.stat().st_blocks == blocks
    await invariant.verify(vm)


async def test_interrupted_is_130_and_nothing_is_left(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary, guest=True)
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "4M"}])])
    async with Controller(command("apply", path, "--watch", "--json"), vm_dir) as controller:
        await eventually(lambda: is_armed(vm), "watch")
        # A watcher that lives is no reason to recover.
        assert (await cli("recover", vm.second_monitor_path, "--check"))[0] == 0
        await vm.guest.write(0, 0, 3 * MIB, seq=1, seed=1)
        await controller.wait_for_output(r"\d:\d\d vd0 of .*: [1-9][\d,]+ bytes reserved; \d")
        await eventually(lambda: is_armed(vm), "be armed again")
        controller.kill(signal.SIGINT)
        assert await controller.wait() == 130
        assert "keeping the room ahead of 1 disk; Ctrl-C ends it" in controller.stderr
        assert "nothing of ours is left in the VM" in controller.stderr
        [result] = valid(controller.stdout, "apply")
    assert result["state"] == "done"
    assert result["ahead"]["reserved"] == 4 * MIB
    assert result["watch"]["top_ups"] == 1
    assert result["watch"]["error"] is None
    assert result["watch"]["reserved"] > 2 * MIB
    assert await armed(vm) == {}
    await invariant.verify(vm)


async def is_armed(vm):
    return bool(await armed(vm))


async def test_until_every_vm_has_ended(start_qemu, invariant, vm_dir, qemu_binary):
    vms = []
    for name in ("a", "b"):
        images = await built(alone(), vm_dir / name, qemu_binary)
        vms.append(await start_qemu(images, guest=True))
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "4M"}]) for vm in vms])
    async with Controller(command("apply", path, "--watch"), vm_dir) as controller:
        for vm in vms:
            await eventually(lambda vm=vm: is_armed(vm), "watch")
        await vms[0].quit()
        await controller.wait_for_output("the VM has ended")
        # The other one goes on.
        await vms[1].guest.write(0, 0, 3 * MIB, seq=1, seed=1)
        await controller.wait_for_output(rf"vd0 of {vms[1].monitor_path}: [1-9][\d,]+ bytes res")
        await vms[1].quit()
        assert await controller.wait() == 0, controller.stderr
        assert controller.stderr.count("the VM has ended") == 2


async def test_one_disk_fails_and_the_others_go_on(start_qemu, invariant, vm_dir, qemu_binary):
    vms = []
    for name in ("a", "b"):
        images = await built(alone(), vm_dir / name, qemu_binary)
        vms.append(await start_qemu(images, guest=True))
    theirs = {"node-name": "d0-file", "write-threshold": 99 * MIB}
    await vms[0].execute("block-set-write-threshold", **theirs)
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "4M"}]) for vm in vms])
    async with Controller(command("apply", path, "--watch", "--json"), vm_dir) as controller:
        await controller.wait_for_output("failed: somebody has set a write threshold")
        assert await locks(vms[0]) == []
        await eventually(lambda: is_armed(vms[1]), "watch")
        await vms[1].guest.write(0, 0, 3 * MIB, seq=1, seed=1)
        await controller.wait_for_output(rf"vd0 of {vms[1].monitor_path}: [1-9][\d,]+ bytes res")
        await vms[1].quit()
        assert await controller.wait() == 1
        first, second = valid(controller.stdout, "apply")
    assert "somebody has set" in first["watch"]["error"]
    assert (second["watch"]["error"], second["watch"]["top_ups"]) == (None, 1)
    assert await armed(vms[0]) == {"d0-file": 99 * MIB}
    await vms[0].execute("block-set-write-threshold", **{**theirs, "write-threshold": 0})
    await invariant.verify(vms[0])


async def test_no_space_to_the_end_is_1(start_qemu, invariant, vm_dir, qemu_binary):
    try:
        mounted = small_file_system(vm_dir / "small", 16 * MIB)
        async with mounted as small:
            vm = await start_qemu(await built(alone(), small / "images", qemu_binary))
            fill_up(small, leave=MIB)
            path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "8M"}])])
            code, out, err = await cli("plan", path)
            assert code == 1, err  # the file system has but one megabyte
            assert "some of which may be there: the file system cannot tell" in out
            run = command("apply", path, "--watch", "--json")
            async with Controller(run, vm_dir) as controller:
                await controller.wait_for_output("no room: .*; it is tried again")
                await vm.quit()
                assert await controller.wait() == 1
                [result] = valid(controller.stdout, "apply")
            assert result["state"] == "failed"  # what apply itself could not make
            assert "No space left" in result["watch"]["error"]
    except UnsupportedError as error:
        pytest.skip(str(error))


# -- killed


async def killed(vm, vm_dir, path):
    """Begin to watch, and kill -9 it; return the threshold that it leaves."""
    async with Controller(command("apply", path, "--watch"), vm_dir) as controller:
        await eventually(lambda: is_armed(vm), "watch")
        controller.kill()
    left = await armed(vm)
    assert await locks(vm) == [LOCK]
    return left


async def test_killed_and_recovered(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary)
    path = written(vm_dir, [(vm, [{"disk": "vd0", "ahead": "4M"}])])
    left = await killed(vm, vm_dir, path)
    code, out, err = await cli("recover", vm.monitor_path, "--dry-run", "--json")
    assert code == 0, err
    [found] = valid(out, "recover")
    assert (found["what"], found["steps"][0]["verb"]) == (f"use of {LOCK}", "remove")
    assert await armed(vm) == left
    assert (await cli("recover", vm.monitor_path, "--check"))[0] == 4
    assert (await cli("recover", vm.monitor_path))[0] == 0
    assert await armed(vm) == {}
    await invariant.verify(vm)

    # The next watcher does it, too, and has the room that the dead one made.
    await invariant.begin(vm)
    await killed(vm, vm_dir, path)
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        assert watch.told[0].reserved == 0
        assert len(await armed(vm)) == 1
    await invariant.verify(vm)

    # A threshold that somebody has set since is theirs.
    await invariant.begin(vm)
    await killed(vm, vm_dir, path)
    theirs = {"node-name": "d0-file", "write-threshold": 99 * MIB}
    await vm.execute("block-set-write-threshold", **theirs)
    assert (await cli("recover", vm.monitor_path))[0] == 0
    assert await armed(vm) == {"d0-file": 99 * MIB}
    await vm.execute("block-set-write-threshold", **{**theirs, "write-threshold": 0})
    await invariant.verify(vm)


# Watches that die before or after the Nth command they send, forked off one interpreter.
DYING = """
import asyncio, os, sys
import qmpblock, qmpblock.allocation.watch, qmpblock.qemu.monitor, qmpblock.vm
real = qmpblock.qemu.monitor.Monitor._execute
def watch(number, moment):
    count = 0
    async def dying(self, command, arguments):
        nonlocal count
        count += 1
        mine = count  # others are sent before its answer is there
        if mine == number and moment == "before":
            os._exit(9)
        try:
            return await real(self, command, arguments)
        finally:
            if mine == number and moment == "after":
                os._exit(9)
            if command == "block-set-write-threshold":
                os._exit(0)
    qmpblock.qemu.monitor.Monitor._execute = dying
    async def main():
        async with qmpblock.connect(sys.argv[1]) as vm:
            await (await vm.disk("vd0")).keep_ahead(4 << 20)
    asyncio.run(main())
for line in sys.stdin:
    number, moment = line.split()
    child = os.fork()
    if not child:
        try:
            watch(int(number), moment)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


async def test_killed_at_every_command(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await one(start_qemu, vm_dir, qemu_binary)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DYING, vm.monitor_path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        for number in range(1, 99):
            ends = []
            for moment in ("before", "after"):
                process.stdin.write(f"{number} {moment}\n".encode())
                ends.append(int(await process.stdout.readline()))
                await controller.recover()
                assert (await armed(vm), await locks(vm)) == ({}, []), (number, moment)
            if ends == [0, 0]:
                break
            assert ends[0] == 9
        assert number > 10
    process.stdin.close()
    await process.wait()
    await invariant.verify(vm)
