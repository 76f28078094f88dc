"""What another version of qmpblock left is never skipped, never removed, its work never touched."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chains import cli
from disturbed import locks, nothing_of_ours, until

import qmpblock
from qmpblock.errors import RecordError
from qmpblock.testing.faults import Controller

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]
DISK, NBD = "qmpblock-disk-vd0", "qmpblock-nbd"


def newer(said):
    said |= {"format": 9, "version": "9.9"}


def more_in_it(said):
    said["details"] = {"work": said["details"]["record"]}


#: How a lock may differ from what this version writes, and what is then said of it.
CHANGES = {
    "a newer format": (newer, "written by qmpblock 9.9"),
    "another operation": (
        lambda said: said["details"]["record"].update(operation="mirror"),
        "operation is 'mirror'",
    ),
    "no record": (more_in_it, "does not say what"),
    "no job": (lambda said: said["details"]["record"].pop("job"), "does not say what"),
    "no boot": (lambda said: said.pop("boot"), "field boot is absent"),
    "not JSON": (None, "no JSON"),
}


async def data(vm, name):
    return await vm.execute("qom-get", path=f"/objects/{name}", property="data")


async def put(vm, name, text):
    await vm.execute("qom-set", path=f"/objects/{name}", property="data", value=text)


def committing(vm, vm_dir):
    """Return a controller that commits the active layer, slowly."""
    command = (sys.executable, "-m", "qmpblock", "commit", vm.monitor_path, "vd0")
    return Controller([*command, "--speed", "64K"], vm_dir)


async def jobs(vm):
    return [(job["id"], job["status"]) for job in await vm.execute("query-jobs")]


async def running(vm):
    """Wait until the job runs; return it."""

    async def look():
        return [job for job in await jobs(vm) if job[1] == "running"]

    return await until(look, "a running job")


@pytest.mark.parametrize("how", CHANGES)
async def test_a_dead_controllers_lock(how, start_qemu, scenario, vm_dir, invariant):
    vm = await start_qemu(scenario)
    async with committing(vm, vm_dir) as controller:
        before = await running(vm)
        controller.kill()
    text = await data(vm, DISK)
    change, why = CHANGES[how]
    said = json.loads(text)
    if change is not None:
        change(said)
    await put(vm, DISK, json.dumps(said) if change else "damaged")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")

        async def commit():
            async with disk.commit():
                pass

        for attempt in (
            commit,
            lambda: disk.snapshot(vm_dir / "images" / "never.qcow2"),
            lambda: disk.allocate(0, 65536),
            controller.recover,
            lambda: controller.recover(carry_on=True),
        ):
            with pytest.raises(RecordError, match=why) as caught:
                await attempt()
            assert caught.value.exit_code == 1
        assert DISK in str(caught.value)
    code, _, err = await cli("recover", "--check", vm.monitor_path)
    assert code == 4
    assert why in err
    assert await jobs(vm) == before
    assert await locks(vm) == {DISK}
    assert any(Path(os.environ["QMPBLOCK_STATE"]).glob("*.journal"))
    # The version that wrote it finds all as it was.
    await put(vm, DISK, text)
    async with qmpblock.connect(vm.monitor_path) as controller:
        await controller.recover()
    await nothing_of_ours(vm)
    if vm.version < (8,):
        invariant.expect("open file: .*/d0-0.qcow2 for reading", "node: d0-2", "edge: d0-2")


@pytest.mark.parametrize("where", ["a newer lock", "an older lock"])
async def test_a_server_that_another_version_uses(where, start_qemu, scenario, vm_dir):
    vm = await start_qemu(scenario)
    code = (
        "import sys; from qmpblock.qemu.lock import Holder\n"
        "print(Holder.me('deadbeef', monitor='m', path='', ports=[], custody=False, "
        "exports=['qmpblock-deadbeef-0']).text())"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    if where == "a newer lock":
        newer(said)
    else:
        del said["format"], said["version"]
    await vm.execute("object-add", qom_type="secret", id=NBD, data=json.dumps(said))
    async with qmpblock.connect(vm.monitor_path, stall=0.3) as controller:
        disk = await controller.disk("vd0")
        if where == "an older lock":
            await disk.map()
        else:
            for attempt in (disk.map, controller.recover):
                with pytest.raises(RecordError, match=r"written by qmpblock 9\.9"):
                    await attempt()
            assert await locks(vm) == {NBD}
            await vm.execute("object-del", id=NBD)
    await nothing_of_ours(vm)


async def test_journals_after_the_death_of_both(start_qemu, scenario, vm_dir):
    vm = await start_qemu(scenario)
    async with committing(vm, vm_dir) as controller:
        await running(vm)
        controller.kill()
    await vm.kill()
    image = vm.disks[0].active.path
    (state,) = Path(os.environ["QMPBLOCK_STATE"]).glob("*.journal")
    (beside,) = image.parent.glob("*.journal")
    for path, change in ((beside, newer), (state, newer), (beside, None)):
        text = path.read_text()
        first, *rest = text.splitlines(keepends=True)
        said = json.loads(first)
        if change is not None:
            change(said)
        path.write_text((json.dumps(said) if change else first[:80]) + "\n" + "".join(rest))
        before = {one: one.read_bytes() for one in (state, beside)}
        code, out, err = await cli("recover", "--check", str(image))
        assert code == 4, out
        assert "safe" not in out
        assert str(path) in err
        code, _, err = await cli("recover", str(image))
        assert code == 1
        assert "9.9" in err if change else "damaged" in err
        assert {one: one.read_bytes() for one in (state, beside)} == before
        path.write_text(text)
    # What the next version added is kept, and does not matter.
    path = beside
    path.write_text(beside.read_text().replace("{", '{"later": 1, ', 1))
    state.write_text(state.read_text().replace("{", '{"later": 1, ', 1))
    code, out, _ = await cli("recover", str(image))
    assert code == 0
    assert f"start the VM from {image}" in out
    assert not beside.exists()
    assert not state.exists()
