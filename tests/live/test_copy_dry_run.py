"""A copy that is not made: what is said of it, that it is so, and that nothing was changed."""

import json
import re
import time
from pathlib import Path

import pytest
from chains import cli
from jsonschema import Draft202012Validator
from untouched import OF_A_MAP, changing, every_file

import qmpblock
from qmpblock.errors import BusyError, NoRoomError, RequestError, UnsupportedError
from qmpblock.testing.images import Tools, build

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = Path(__file__).parents[2] / "docs/schema/copy-plan.schema.json"


@pytest.mark.parametrize("at", ["start", "end", "pivot"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.scenarios("two-disks-one-base.yaml")
async def test_it_is_as_it_is_said(scenario, at, fmt, start_qemu, invariant, vm_dir, qemu_binary):
    """Bytes, room and way of two disks; then they are copied."""
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    (vm_dir / "copies").mkdir()
    before = every_file(vm_dir)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        targets = {disk: vm_dir / "copies" / disk.name for disk in disks}
        options = {"pivot": True} if at == "pivot" else {"at": at}
        planned = await controller.plan_copy(targets, format=fmt, **options)
        assert every_file(vm_dir) == before
        assert changing(vm) <= OF_A_MAP
        old = vm.version < (10, 0, 0)
        wanted = "mirrors" if at != "start" else "frozen layers" if old else "views"
        assert (planned.point, planned.way, planned.warnings) == (at, wanted, ())
        for disk, one in zip(disks, planned.disks, strict=True):
            assert (one.disk, one.target) == (disk.name, str(targets[disk]))
            assert one.read == (await disk.map()).data().total
            assert one.read <= one.write <= one.size
            assert (one.kept is None) is (at != "start")
        if at == "pivot":
            invariant.forget(vm)
        async with controller.copy(targets, format=fmt, **options) as job:
            async for seen in job:
                if seen.ready:
                    break
    for one in planned.disks:
        taken = Path(one.target).stat().st_blocks * 512
        assert one.write <= taken <= max(one.room.needed, one.write + 64 * 1024)
        assert one.room.needed < one.room.free


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.scenarios("chain-3.yaml", "raw-sparse.yaml")
async def test_the_time_is_about_what_it_takes(scenario, at, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        options = {"at": at, "format": "raw", "speed": 2 * MIB}
        planned = await disk.plan_copy(vm_dir / "copy", **options)
        assert planned.seconds is not None
        assert (await disk.plan_copy(vm_dir / "copy")).seconds is None
        started = time.monotonic()
        async with disk.copy(vm_dir / "copy", **options) as job:
            async for seen in job:
                if seen.ready:
                    break
            took = time.monotonic() - started
    assert job.result is not None
    assert planned.seconds / 1.5 < took < planned.seconds * 3 + 20


@pytest.mark.parametrize("layers", ["all", "top"])
@pytest.mark.scenarios("chain-3.yaml", "qcow2-zero-clusters.yaml", "raw-sparse.yaml")
async def test_what_counts_for_the_speed(scenario, layers, start_qemu, vm_dir):
    """The time of a copy of the start is reckoned from what the job goes over, to the byte."""
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        planned = await disk.plan_copy(vm_dir / "copy", layers=layers, speed=MIB)
        async with disk.copy(vm_dir / "copy", layers=layers) as job:
            pass
    assert job.result is not None
    assert planned.seconds == job.result.disks[0].copied / MIB


@pytest.mark.scenarios("chain-3.yaml")
async def test_the_command(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    target = vm_dir / "copy.raw"
    before = every_file(vm_dir)
    words = ("copy", vm.monitor_path, f"vd0={target}", "--dry-run", "--speed", "2M")
    code, out, err = await cli(*words, "--format", "raw", "--json")
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    assert told["speed"] == 2 * MIB
    assert 7 * MIB / told["speed"] <= told["seconds"] < 8 * MIB / told["speed"]  # what it holds
    assert told["disks"][0]["target"] == str(target)
    code, out, err = await cli(*words, "--at", "end", "--verify")
    assert (code, out) == (2, "")
    code, out, err = await cli(*words, "--at", "end")
    assert (code, err) == (0, "")
    assert re.search(r"vd0: would be copied to .*, qcow2, 16M, as it is when the copy ends", out)
    assert "7M to read, 7M to write; room: " in out
    assert "by mirrors: " in out
    assert "\n4 s at 2M/s\nnothing was copied" in out
    assert every_file(vm_dir) == before
    code, _, err = await cli("map", vm.monitor_path, "vd0")
    assert (code, changing(vm) <= OF_A_MAP) == (0, True)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"target": "/no/such/folder/a"}, RequestError),
        ({"target": "there"}, RequestError),
        ({"format": "vmdk"}, UnsupportedError),
        ({"at": "end", "verify": True}, UnsupportedError),
        ({"target": "nbds://host/x"}, RequestError),
        ({"target": "nbd://host/x", "pivot": True}, UnsupportedError),
        ({"tls_creds": "/nowhere"}, RequestError),
        ({"fleece_limit": 1}, RequestError),
        ({"fleece": "/no/such/folder"}, (UnsupportedError, NoRoomError)),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.scenarios("chain-3.yaml")
async def test_what_is_refused_is_refused_alike(words, error, scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    (vm_dir / "there").touch()
    words = dict(words)
    target = words.pop("target", "copy")
    target = target if "://" in target else vm_dir / target
    async with qmpblock.connect(vm.monitor_path) as controller:
        if "fleece" in str(words) and controller.capabilities.jobs_misread_views:
            pytest.skip("frozen layers keep nothing")
        disk = await controller.disk("vd0")
        with pytest.raises(error) as planned:
            await disk.plan_copy(target, **words)
        with pytest.raises(error) as refused:
            async with disk.copy(target, **words):
                pass
        assert str(planned.value) == str(refused.value)
        assert changing(vm) <= OF_A_MAP


@pytest.mark.scenarios("chain-3.yaml")
async def test_a_disk_that_is_being_copied(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.copy(vm_dir / "copy", at="end", speed=MIB):
            with pytest.raises(BusyError):
                await disk.plan_copy(vm_dir / "other")


@pytest.mark.scenarios("chain-3.yaml")
async def test_without_a_map_it_says_so(scenario, start_qemu, invariant, vm_dir):
    """Somebody else has the one NBD server: a copy does not need it, a map does."""
    vm = await start_qemu(scenario)
    where = {"type": "unix", "data": {"path": str(vm_dir / "foreign")}}
    await vm.execute("nbd-server-start", addr=where)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        planned = await disk.plan_copy(vm_dir / "copy", speed=MIB)
        [one] = planned.disks
        assert (one.read, one.write, one.room, planned.seconds) == (None, None, None, None)
        assert "how much vd0 holds cannot be told beforehand" in planned.warnings[0]
        with pytest.raises(BusyError):
            await disk.plan_copy(vm_dir / "copy", verify=True)
        async with disk.copy(vm_dir / "copy") as job:
            pass
    assert job.result is not None
    await vm.execute("nbd-server-stop")
    code, out, _ = await cli("copy", vm.monitor_path, "vd0", str(vm_dir / "b"), "--dry-run")
    assert (code, "to read" in out) == (0, True)
    invariant.forget(vm)


@pytest.mark.parametrize(
    "words",
    [
        {"allocation": "full", "format": "raw"},
        {"allocation": "full", "format": "qcow2"},
        {"allocation": "like", "format": "raw"},
        {"cluster_size": 2 * MIB, "format": "qcow2"},
        {"compress": True, "format": "qcow2"},
    ],
    ids=str,
)
@pytest.mark.scenarios("chain-3.yaml", "raw-fallocated.yaml")
async def test_the_room_of_what_is_asked_for(words, scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        planned = await disk.plan_copy(vm_dir / "copy", **words)
        async with disk.copy(vm_dir / "copy", **words):
            pass
    taken = (vm_dir / "copy").stat().st_blocks * 512
    [one] = planned.disks
    assert taken <= one.room.needed <= max(taken, one.size) + 24 * MIB
    if words.get("allocation") == "full":
        assert taken >= one.size
