"""`qmpblock metrics`, and `--metrics`, of VMs that live, hang, are held, or need a recovery."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours, until
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

import qmpblock
from qmpblock.metrics.figures import examine, gather
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

SCHEMA = Path(__file__).parents[2] / "docs/schema/metrics.schema.json"
MIB = 1 << 20
CHAIN = """
about: A chain.
images:
  - {format: raw, size: 8M, content: [write 0 3M 0xaa]}
  - {size: 8M, content: [write 2M 2M 0xbb, zero 6M 1M]}
"""


def samples(text):
    """Return the values of a text, by name and by the labels but for the VM's."""
    return {
        (
            one.name,
            *(value for name, value in sorted(one.labels.items()) if name != "vm"),
        ): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


async def test_they_are_what_a_map_says(start_qemu, invariant):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disk("vd0")).make_room(MIB)
    invariant.forget(vm)  # the room
    code, text, err = await cli("metrics", vm.monitor_path)
    assert (code, err) == (0, "")
    found = samples(text)
    code, printed, _ = await cli("map", vm.monitor_path, "vd0", "--totals", "--json")
    assert code == 0
    layers = json.loads(printed)["totals"]
    for layer in layers:
        for kind in ("data", "zero", "reserved"):
            key = ("qmpblock_disk_layer_bytes", str(layer["depth"]), "vd0", kind)
            assert found[key] == layer[kind], key
    assert found["qmpblock_disk_size_bytes", "vd0"] == 8 * MIB
    below = sum(layer["data"] + layer["zero"] for layer in layers[1:])
    assert found["qmpblock_disk_backing_bytes", "vd0"] == below > 2 * MIB
    assert found["qmpblock_room_bytes", "vd0"] >= MIB
    assert found["qmpblock_host_free_bytes", "vd0"] > 0
    assert (found["qmpblock_up",], found["qmpblock_recovery_needed",]) == (1, 0)
    code, printed, err = await cli("metrics", vm.monitor_path, "--json", "--no-map")
    assert (code, err) == (0, "")
    told = json.loads(printed)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    assert told["vms"][0]["disks"][0]["layers"] is None
    await nothing_of_ours(vm)


async def test_one_that_hangs_or_is_held_does_not_keep_the_others(start_qemu, invariant):
    vms = [await start_qemu(parse_scenario(CHAIN, "chain")) for _ in range(3)]
    addresses = [str(vm.monitor_path) for vm in vms]
    invariant.forget(vms[1])  # it is stopped, and by then anything may be half done
    async with qmpblock.connect(addresses[0]):
        os.kill(vms[1].pid, signal.SIGSTOP)
        try:
            held, hanging, well = await gather(addresses, qmpblock.connect, limit=600)
        finally:
            os.kill(vms[1].pid, signal.SIGCONT)
    assert (held.up, held.held) == (False, True)
    assert (hanging.up, hanging.held) == (False, False)
    assert hanging.error
    assert well.up, well.error
    assert well.disks[0].layers is not None


async def test_a_vm_whose_nbd_server_is_in_use_is_not_silent(start_qemu, invariant):
    """As of a backup, which takes hours."""
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    async with (
        qmpblock.connect(vm.monitor_path) as other,
        other.point_in_time([await other.disk("vd0")]),
        qmpblock.connect(vm.second_monitor_path) as watching,
    ):
        seen = await examine(watching, "vm", maps=0.2)
        assert (seen.up, seen.error) == (True, None)
        (disk,) = seen.disks
        assert (disk.size, disk.layers) == (8 * MIB, None)
        assert disk.error.startswith(
            f"somebody else uses the VM's NBD server: process {os.getpid()}"
        )
    await nothing_of_ours(vm)


async def test_whether_a_recovery_is_needed(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    command = (sys.executable, "-m", "qmpblock", "export", str(vm.monitor_path), "vd0", "--")
    begun = vm_dir / "begun"
    process = await asyncio.create_subprocess_exec(
        *command, "sh", "-c", f"touch {begun}; exec sleep 1000"
    )
    try:
        await until(begun.exists, "the command")
    finally:
        process.kill()
        await process.wait()
    code, text, _ = await cli("metrics", vm.monitor_path, "--no-map")
    assert code == 0
    assert samples(text)["qmpblock_recovery_needed",] == 1
    assert (await cli("recover", vm.monitor_path))[0] == 0
    code, text, _ = await cli("metrics", vm.monitor_path, "--no-map")
    assert samples(text)["qmpblock_recovery_needed",] == 0
    await nothing_of_ours(vm)


async def test_long_work_tells_how_far_it_is(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    file, target = vm_dir / "f.prom", vm_dir / "copy.qcow2"
    words = ("copy", str(vm.monitor_path), "vd0", str(target), "--speed", "1M")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", *words, "--metrics", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    labels = ("copy", "copy of vd0")
    try:

        def told():
            found = samples(file.read_text()) if file.exists() else {}
            return found.get(("qmpblock_job_total_bytes", *labels))

        await until(told, "how far it is")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 130, err
    assert not file.exists()
    await nothing_of_ours(vm)
