"""Copies that a policy wants: made once, and left alone from then on."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from applying import SCHEMAS, written
from chains import cli
from jsonschema import Draft202012Validator

from qmpblock.policy import apply, plan
from qmpblock.policy.file import parse_policy
from qmpblock.testing.faults import small_file_system
from qmpblock.testing.images import Tools, build

pytestmark = [pytest.mark.live, pytest.mark.scenarios("two-disks-one-base.yaml")]

MIB = 1 << 20


def wanting(vm, *entries, **more):
    return {**more, "vms": [{"address": vm.monitor_path, "copies": list(entries)}]}


async def said(command, path, code):
    """Run `qmpblock plan` or `apply`; return what it says of the copies."""
    got, out, err = await cli(command, path, "--json")
    assert got == code, err
    value = json.loads(out)
    schema = json.loads((SCHEMAS / f"{command}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    how = json.loads((SCHEMAS / "copy-plan.schema.json").read_text())
    for one in value["copies"]:
        if one.get("planned") is not None:
            Draft202012Validator(how).validate(one["planned"])
    return value["copies"]


async def started(scenario, start_qemu, vm_dir, qemu_binary, **words):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    (vm_dir / "copies").mkdir()
    return await start_qemu(built, **words)


async def test_a_copy_is_made_once(scenario, start_qemu, vm_dir, qemu_binary):
    """Of two disks at one instant; the next time there is nothing to do, whatever they hold."""
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    [left, right] = files = [vm_dir / "copies" / "left.qcow2", vm_dir / "copies" / "right.qcow2"]
    entry = {
        "disks": {"vleft": str(left), "vright": str(right)},
        "format": "qcow2",
        "verify": "yes",
    }
    path = written(vm_dir, wanting(vm, entry))
    [pending] = await said("plan", path, 0)
    assert (pending["state"], pending["planned"]["verify"]) == ("pending", True)
    assert [one["target"] for one in pending["planned"]["disks"]] == [str(one) for one in files]
    assert not any(one.exists() for one in files)
    [done] = await said("apply", path, 0)
    assert (done["state"], done["made"]["verified"], done["made"]["point"]) == ("done", 1, "start")
    kept = [(one.stat().st_ino, one.stat().st_mtime_ns) for one in files]
    [there] = await said("plan", path, 0)
    assert (there["state"], there["planned"]) == ("there", None)
    [done] = await said("apply", path, 0)
    assert (done["state"], done["made"]) == ("nothing", None)
    assert [(one.stat().st_ino, one.stat().st_mtime_ns) for one in files] == kept
    code, out, _ = await cli("plan", path)
    assert (code, f"nothing to do: {left}, {right} are there" in out) == (0, True)
    code, out, _ = await cli("apply", path)
    assert (code, out.splitlines()[-1]) == (0, "1 entry of copies: 1 there already")
    right.unlink()  # one alone is of no instant with a new one
    [failed] = await said("plan", path, 1)
    assert (failed["state"], f"{left} is there, and not all" in failed["error"]) == ("failed", True)
    [failed] = await said("apply", path, 1)
    assert failed["state"] == "failed"
    path = written(vm_dir, wanting(vm, entry | {"force": "yes"}))
    [done] = await said("apply", path, 0)
    assert done["state"] == "done"
    assert left.stat().st_ino != kept[0][0]
    assert (await said("apply", path, 0))[0]["state"] == "nothing"  # by force once, too
    tools = Tools.of(qemu_binary)
    for one in files:
        await tools.run(tools.img, "check", "-f", "qcow2", str(one))
    assert sorted(vm_dir.glob("copies/*")) == files


@pytest.mark.parametrize("at", ["start", "end"])
async def test_it_goes_on_after_it_was_killed(scenario, at, start_qemu, vm_dir, qemu_binary):
    """What a killed one left is gone on from; the copy that was whole stays."""
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    first, second = vm_dir / "copies" / "first", vm_dir / "copies" / "second"
    slow = {"disks": {"vright": str(second)}, "at": at, "speed": "64K"}
    policy = wanting(vm, {"disks": {"vleft": str(first)}, "at": "end"}, slow)
    path = written(vm_dir, policy)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "apply", path),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(60):
        while not Path(f"{second}.partial").exists():
            await asyncio.sleep(0.01)
        while not [one for one in await vm.execute("query-jobs") if one["status"] == "running"]:
            await asyncio.sleep(0.01)
    kept = first.stat().st_ino
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert not second.exists()
    del slow["speed"]
    path = written(vm_dir, policy)
    plans = await said("plan", path, 1)
    assert [one["state"] for one in plans] == ["there", "failed"]
    assert "a controller that died left this disk" in plans[1]["error"]
    done = await said("apply", path, 0)
    assert [one["state"] for one in done] == ["nothing", "done"]
    assert done[1]["made"]["disks"][0]["compared"] is not None
    assert first.stat().st_ino == kept
    assert sorted(vm_dir.glob("copies/*")) == [first, second]
    assert (await said("apply", path, 0))[1]["state"] == "nothing"


async def test_what_a_copy_left_unfinished_goes_unless_it_is_in_use(
    scenario, start_qemu, vm_dir, qemu_binary
):
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    target = vm_dir / "copies" / "copy"
    partial = vm_dir / "copies" / "copy.partial"
    partial.write_bytes(b"half")
    for at in ("start", "end"):
        path = written(vm_dir, wanting(vm, {"disks": {"vleft": str(target)}, "at": at}))
        for command in ("plan", "apply"):
            assert "nothing can go on from" in (await said(command, path, 1))[0]["error"]
    anew = {"disks": {"vleft": str(target)}, "format": "qcow2", "cluster_size": "4K"}
    path = written(vm_dir, wanting(vm, anew))
    with partial.open():
        assert "is open in" in (await said("plan", path, 1))[0]["error"]
        assert "is open in" in (await said("apply", path, 1))[0]["error"]
    assert partial.read_bytes() == b"half"
    assert (await said("plan", path, 0))[0]["state"] == "pending"
    assert partial.read_bytes() == b"half"
    assert (await said("apply", path, 0))[0]["state"] == "done"
    assert [target] == list(vm_dir.glob("copies/*"))


async def test_a_file_that_is_no_copy_stays(scenario, start_qemu, vm_dir, qemu_binary):
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    target = vm_dir / "copies" / "copy"
    target.write_bytes(b"precious")
    entry = {"disks": {"vleft": str(target)}, "format": "qcow2"}
    for name, form in (("no qcow2 image", "qcow2"), ("an image of 512 bytes", "raw")):
        path = written(vm_dir, wanting(vm, entry | {"format": form}))
        [one] = await said("plan", path, 1)
        assert f"copy is {name}, so it is no copy of vleft" in one["error"]
        await said("apply", path, 1)
        assert target.read_bytes() == b"precious"
    path = written(vm_dir, wanting(vm, entry | {"force": "yes"}))
    assert (await said("apply", path, 0))[0]["state"] == "done"


@pytest.mark.parametrize("force", ["no", "yes"])
async def test_an_image_of_the_vm_itself_is_no_copy(
    scenario, force, start_qemu, vm_dir, qemu_binary
):
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    files = sorted((vm_dir / "images").iterdir())
    assert len(files) >= 3
    kept = [(one.stat().st_ino, one.stat().st_mtime_ns) for one in files]
    for file in files:
        path = written(vm_dir, wanting(vm, {"disks": {"vleft": str(file)}, "force": force}))
        for command in ("plan", "apply"):
            [one] = await said(command, path, 1)
            assert f"{file} is open in the VM itself" in one["error"]
    assert [(one.stat().st_ino, one.stat().st_mtime_ns) for one in files] == kept


async def test_disks_and_copies_of_one_policy(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    """A disk is made as it should be first; a copy that fails does not keep the others."""
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    invariant.expect(r"^(disappeared: (node|edge|open file): |appeared: (node|edge): )")
    target = vm_dir / "copies" / "copy.qcow2"
    wanted = {
        "vms": [
            {
                "address": vm.monitor_path,
                "disks": [{"disk": "vleft", "backing": "independent"}],
                "copies": [
                    {"disks": {"vright": "/no/such/folder/copy"}},
                    {"disks": {"vleft": str(target)}, "layers": "top"},
                ],
            }
        ]
    }
    policy = parse_policy(yaml.safe_dump(wanted))
    assert [one.error is None for one in await plan(policy)] == [True, False, True]
    seen = []
    done = await apply(policy, progress=lambda wanted, news: seen.append((wanted.disk, news.done)))
    assert [one.state for one in done] == ["done", "failed", "done"]
    tools = Tools.of(qemu_binary)
    told = await tools.run(tools.img, "info", "-f", "qcow2", "--output=json", str(target))
    assert "backing-filename" not in json.loads(told)  # the disk was independent by then
    assert [name for name, _ in seen if name == "vleft"]
    code, out, err = await cli("apply", written(vm_dir, wanted))
    assert code == 1
    assert "vright of" in err
    assert "1 entry of copies" not in out
    assert "2 entries of copies: 1 there already, 1 failed" in out
    assert "1 disk: 1 as they should be" in out


async def test_host_space_that_must_stay_free(scenario, start_qemu, vm_dir, qemu_binary):
    vm = await started(scenario, start_qemu, vm_dir, qemu_binary)
    path = written(
        vm_dir,
        wanting(vm, {"disks": {"vleft": str(vm_dir / "copies" / "copy")}}, keep_free="100%"),
    )
    for command in ("plan", "apply"):
        [one] = await said(command, path, 1)
        assert "the policy keeps" in one["error"]
    assert list(vm_dir.glob("copies/*")) == []


async def test_a_copy_is_given_up_where_the_host_runs_short(
    scenario, start_qemu, vm_dir, qemu_binary
):
    """Nothing of it stays, for that would hold the very room."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    async with small_file_system(vm_dir / "copies", 64 * MIB) as small:
        vm = await start_qemu(built)
        entry = {"disks": {"vleft": str(small / "copy")}, "at": "end", "speed": "256K"}
        path = written(vm_dir, wanting(vm, entry, keep_free="32M"))
        running = asyncio.ensure_future(said("apply", path, 1))
        async with asyncio.timeout(60):
            while not (small / "copy.partial").exists():
                await asyncio.sleep(0.01)
        (small / "filler").write_bytes(bytes(40 * MIB))
        [one] = await running
        assert "which the policy keeps so" in one["error"]
        assert one["state"] == "failed"
        assert [file.name for file in small.iterdir()] == ["filler"]
        (small / "filler").unlink()
        path = written(vm_dir, wanting(vm, entry | {"speed": "0"}, keep_free="32M"))
        assert (await said("apply", path, 0))[0]["state"] == "done"
