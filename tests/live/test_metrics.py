"""`qmpblock metrics`, and `--metrics`, of VMs that live, hang, are held, or need a recovery."""

import asyncio
import contextlib
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
from qmpblock.cli.app import run
from qmpblock.cli.recording import Recorder
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


@contextlib.asynccontextmanager
async def at_work(file, *words, after=()):
    """Run a command with `--metrics FILE`; yields it, and what is in the file whenever asked."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", *map(str, words), "--metrics", str(file), *after),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )

    def told():
        assert process.returncode is None, "it has ended"
        return samples(file.read_text()) if file.exists() else {}

    try:
        yield process, told
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize("stdin", [True, False])
async def test_an_export_tells_of_its_command(stdin, start_qemu, vm_dir, invariant):
    """How much of the disk it has taken; where it reads by NBD nobody knows, and none is told."""
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    file, go = vm_dir / "f.prom", vm_dir / "go"
    waits = f"until [ -e {go} ]; do sleep 0.05; done"
    command = f"head -c 1048576 >/dev/null; {waits}; cat >/dev/null" if stdin else waits
    words = ("export", vm.monitor_path, "vd0", *(["--stdin"] if stdin else []))
    labels = ("export", "export of vd0")
    async with at_work(file, *words, after=("--", "sh", "-c", command)) as (process, told):
        await until(lambda: told().get(("qmpblock_job_seconds", *labels), 0) > 1, "its time")
        found = told()
        assert found.pop(("qmpblock_job_seconds", *labels)) > 1
        if stdin:
            assert found["qmpblock_job_total_bytes", *labels] == 8 * MIB
            assert MIB <= found["qmpblock_job_done_bytes", *labels] < 8 * MIB
            assert ("qmpblock_job_seconds_since_progress", *labels) in found
        else:
            assert found == {}
        go.touch()
        _, err = await process.communicate()
    assert process.returncode == 0, err
    assert not file.exists()
    await nothing_of_ours(vm)


async def test_a_job_that_is_carried_on_tells_how_far_it_is(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    file = vm_dir / "f.prom"

    async def work(told):
        """Return what the stream is called in the file, as soon as it is there."""

        def called():
            return [key[2] for key in told() if key[:2] == ("qmpblock_job_total_bytes", "stream")]

        await until(called, "the stream")
        return called()[0]

    words = ("stream", vm.monitor_path, "vd0", "--speed", "2M")
    async with at_work(file, *words) as (process, told):
        assert await work(told) == "stream of vd0"
        process.kill()
        await process.communicate()
    file.unlink()  # who is killed leaves it
    async with at_work(file, "recover", vm.monitor_path, "--continue") as (process, told):
        name = await work(told)
        assert name.startswith("stream of vd0 (run ")
        _, err = await process.communicate()
    assert process.returncode == 0, err
    assert f"{name}: copying, " in err.decode()
    assert not file.exists()
    await nothing_of_ours(vm)
    invariant.forget(vm)  # its chain is of one layer now


async def test_a_check_of_backups_tells_how_far_it_is(start_qemu, vm_dir, invariant, monkeypatch):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    place, file, seen = vm_dir / "backups", vm_dir / "f.prom", []
    assert (await cli("backup", vm.monitor_path, place))[0] == 0
    monkeypatch.setattr(Recorder, "write", lambda self: seen.append(dict(self._figures)))
    code = await asyncio.to_thread(run, ["backup", "check", str(place), "--metrics", str(file)])
    assert code == 0
    invariant.forget(vm)  # the bitmap of its backup
    (figures,) = seen[-1].values()
    done, total = figures[:2]
    assert (done.metric, done.labels[1:]) == ("job_done_bytes", (f"check of {place}", "check"))
    assert 0 <= done.value <= total.value > 0


async def test_a_watch_tells_the_room_that_it_keeps(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(CHAIN, "chain"))
    invariant.forget(vm)  # the room
    file, policy = vm_dir / "f.prom", vm_dir / "policy.yaml"
    disks = "[{disk: vd0, ahead: 2M}]"
    policy.write_text(f"vms: [{{address: {vm.monitor_path}, disks: {disks}}}]\n")
    async with at_work(file, "apply", policy, "--watch") as (process, told):
        await until(lambda: ("qmpblock_room_wanted_bytes", "vd0") in told(), "the room")
        found = told()
        assert found["qmpblock_room_wanted_bytes", "vd0"] == 2 * MIB
        assert found["qmpblock_room_bytes", "vd0"] >= 2 * MIB
        assert found["qmpblock_host_free_bytes", "vd0"] > 0
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130, err
    assert not file.exists()
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
