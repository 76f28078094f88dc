"""Interrupted when it has taken effect: no verb says then that it was undone."""

import json

import pytest
from signalled import SIGNALS, signalled

import qmpblock

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

#: What each command calls last, once what it was asked for is done: of a change, of a copy.
CHANGED = "qmpblock.changes.change:allow_migration"
LATE = {
    "snapshot": (["vd0={0}/t.qcow2"], CHANGED),
    "commit": (["vd0"], CHANGED),
    "allocate": (["vd0", "--independent"], "qmpblock.qemu.job:Job.dismiss"),
    "stream": (["vd0"], CHANGED),
    "copy-pivot": (["vd0={0}/t.qcow2", "--pivot"], CHANGED),
    "copy-end": (["vd0={0}/t.qcow2", "--at", "end"], "qmpblock.copying.frame:finish_all"),
    "copy-start": (["vd0={0}/t.qcow2", "--at", "start"], "qmpblock.copying.frame:finish_all"),
}


@pytest.mark.parametrize(("number", "times"), SIGNALS[-2:])
@pytest.mark.parametrize("verb", LATE)
async def test_it_is_said_where_the_guest_is(
    verb, number, times, scenario, start_qemu, vm_dir, invariant
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    files = await layers(vm)
    words, after = LATE[verb]
    words = [verb.partition("-")[0], vm.monitor_path, *(word.format(vm_dir) for word in words)]
    code, out, err = await signalled(after, number, times, *words)
    assert (code, "interrupted too late" in err, out) == (1, True, ""), err
    now, made = await layers(vm), vm_dir / "t.qcow2"
    assert made.exists() == ("vd0" not in words)
    if verb in ("copy-end", "copy-start"):
        assert now == files
        assert "the copy is made" in err
    elif verb in ("stream", "allocate"):
        assert now == files[:1]
        assert f"the chain of vd0 is now {now[0]}" in err
    else:
        assert f"the active layer of vd0 is now {now[0]}: start the VM from it" in err
        stale = f"never from {files[0]}, which is stale"
        assert (now[0] != files[0], stale in err) == (True, verb != "snapshot")


#: What is done by the time at which a command disconnects.
DONE = {
    "snapshot": ["vd0={0}/t.qcow2"],
    "commit": ["vd0"],
    "allocate": ["vd0"],
    "stream": ["vd0"],
    "copy": ["vd0={0}/t.qcow2"],
    "backup": ["{0}/backups"],
    "disks": [],
}


@pytest.mark.parametrize(("number", "times"), SIGNALS[-2:])
@pytest.mark.parametrize("verb", DONE)
async def test_what_is_done_is_told_as_done(
    verb, number, times, scenario, start_qemu, vm_dir, invariant
):
    """An interrupt that comes as the command disconnects finds nothing to be undone."""
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    words = [verb, vm.monitor_path, *(word.format(vm_dir) for word in DONE[verb]), "--json"]
    leaves = "qemu.qmp.protocol:AsyncProtocol._schedule_disconnect"
    code, out, err = await signalled(leaves, number, times, *words)
    assert (code, "interrupted" in err) == (0, False), err
    assert json.loads(out)


async def test_in_time_it_is_undone(scenario, start_qemu, vm_dir, invariant):
    vm = await start_qemu(scenario)
    files = await layers(vm)
    words = ("commit", vm.monitor_path, "vd0")
    code, _, err = await signalled("qmpblock.changes.change:forbid_migration", 2, 1, *words)
    assert (code, "interrupted; nothing of ours is left" in err) == (130, True)
    assert await layers(vm) == files


async def layers(vm):
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        return [layer.file for layer in disk.chain.layers]
