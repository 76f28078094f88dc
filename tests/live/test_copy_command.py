"""`qmpblock copy` on a living QEMU, run as a program."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from chains import cli
from jsonschema import Draft202012Validator

from qmpblock.testing.images import Tools
from qmpblock.testing.stamps import StressSpec

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

SCHEMA = Path(__file__).parents[2] / "docs/schema/copy.schema.json"


async def started(start_qemu, scenario):
    vm = await start_qemu(scenario, guest=True)
    spec = StressSpec(offset=12 << 20, blocks=256, block_size=4096, queue_depth=8, rate=1000)
    await vm.guest.stress(spec)
    return vm


async def goes_on(vm):
    before = (await vm.guest.progress()).acked
    async with asyncio.timeout(60):
        while (await vm.guest.progress()).acked < before + 10:
            await asyncio.sleep(0.01)
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done


@pytest.mark.parametrize("words", [["vd0=TARGET"], ["vd0", "TARGET"]], ids=["pair", "two"])
async def test_a_copy_is_told_of(words, scenario, start_qemu, vm_dir, qemu_binary):
    vm = await started(start_qemu, scenario)
    target = vm_dir / "copy.raw"
    words = [word.replace("TARGET", str(target)) for word in words]
    options = ("--at", "end", "--format", "raw", "--json")
    code, out, err = await cli("copy", vm.monitor_path, *words, *options)
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    assert (told["point"], told["disks"][0]["target"]) == ("end", str(target))
    assert "copy of vd0: " in err
    assert target.stat().st_size == told["disks"][0]["size"] == 16 << 20
    await goes_on(vm)
    code, out, _ = await cli("copy", vm.monitor_path, *words, "--at", "end")
    assert code == 2
    code, out, _ = await cli("copy", vm.monitor_path, *words, "--at", "end", "--force")
    assert code == 0
    assert f"vd0: copied to {target}, qcow2, 16M, as it was when the copy ended" in out
    tools = Tools.of(qemu_binary)
    await tools.run(tools.img, "check", "-f", "qcow2", str(target))


async def test_the_guest_goes_over(scenario, start_qemu, invariant, vm_dir):
    vm = await started(start_qemu, scenario)
    invariant.forget(vm)
    target = vm_dir / "copy.qcow2"
    code, out, err = await cli("copy", vm.monitor_path, f"vd0={target}", "--pivot")
    assert code == 0, err
    assert f"the active layer is now {target}: start the VM from it" in out
    assert "is stale from now on" in out
    await goes_on(vm)
    code, out, _ = await cli("disks", vm.monitor_path)
    assert str(target) in out


@pytest.mark.parametrize(
    ("number", "moment", "said"),
    [
        (signal.SIGINT, ("--at", "start"), "as it was when the copy began this time; of 16M that"),
        (signal.SIGTERM, ("--at", "end"), "as it was when the copy ended; of 16M that"),
        (signal.SIGINT, ("--pivot",), "to which the guest has gone over; of 16M that"),
    ],
)
async def test_an_interrupted_one_is_gone_on_from(
    number, moment, said, scenario, start_qemu, vm_dir, invariant
):
    vm = await started(start_qemu, scenario)
    if moment == ("--pivot",):
        invariant.forget(vm)
    target = vm_dir / "copy.qcow2"
    words = ("copy", vm.monitor_path, "vd0", str(target), *moment)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", *words, "--speed", "1M"), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        while not [
            one for one in await vm.execute("query-jobs") if one["current-progress"] >= 3 << 20
        ]:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)  # that it sees it, too
    process.send_signal(number)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    assert await vm.execute("query-jobs") == []
    assert [path.name for path in vm_dir.glob("copy.qcow2*")] == ["copy.qcow2.partial"]
    assert f"what was copied is kept in {target}.partial" in err.decode()
    code, _, err = await cli(*words)
    assert code == 2
    assert "copy.qcow2.partial exists already: a copy that is not whole" in err
    assert "go on from it with --resume" in err
    code, out, err = await cli(*words, "--resume")
    assert code == 0, err
    assert f"{said} were compared " in out
    assert " were missing or had changed, and were copied" in out
    assert [path.name for path in vm_dir.glob("copy.qcow2*")] == ["copy.qcow2"]
    await goes_on(vm)


async def test_one_with_nothing_to_go_on_from_is_a_copy(scenario, start_qemu, vm_dir):
    vm = await started(start_qemu, scenario)
    words = ("copy", vm.monitor_path, "vd0", str(vm_dir / "copy.qcow2"), "--resume", "--json")
    code, out, err = await cli(*words)
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    [one] = told["disks"]
    assert (one["compared"], one["missing"]) == (None, None)
    code, out, err = await cli(*words)
    assert code == 2, out
    assert "copy.qcow2 exists already" in err
    await goes_on(vm)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vd0"], "is not DISK=TARGET"),
        (["vd0=a", "vd0=b", "--at", "end"], "named twice"),
        (["vd0=a", "--pivot", "--at", "end"], "without --at"),
        (["vd0=/no/such/folder/a", "--at", "end"], "there is no directory /no/such/folder"),
        (["vd0=" + 248 * "a", "--at", "end"], "is of 256 bytes"),
        (["vd0=a", "--at", "end", "--format", "vmdk"], "vmdk"),
        (["vd0=nbd://host/x", "--pivot"], "nbd://host:10809/x"),
        (["vd0=a", "--at", "end", "--verify"], "--at start"),
        (["vd9=a"], "no disk called vd9"),
    ],
)
async def test_a_wrong_request_touches_nothing(words, said, scenario, start_qemu):
    vm = await started(start_qemu, scenario)
    code, out, err = await cli("copy", vm.monitor_path, *words)
    assert (code, out) == (2, ""), err
    assert said in err
    await goes_on(vm)
