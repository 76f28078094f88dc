"""`qmpblock backup` and `restore` on a living QEMU, run as a program."""

import json
import os
from pathlib import Path

import pytest
from chains import cli
from fleecing import MIB
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

import qmpblock

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

SCHEMAS = Path(__file__).parents[2] / "docs/schema"
POINT = json.loads((SCHEMAS / "backup-point.schema.json").read_text())
REGISTRY = Registry().with_resource("backup-point.schema.json", Resource.from_contents(POINT))
STAYS = r"appeared: bitmap: qmpblock-backup-[0-9a-f]{8}-[0-9a-f]{8}-\d(-end|-open)? of d0, .*"


async def told(name, *words, code=0):
    """Run a command with --json, and return its document, which is as its schema says."""
    ended, out, err = await cli(*words, "--json")
    assert ended == code, err
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    document = json.loads(out)
    Draft202012Validator(schema, registry=REGISTRY).validate(document)
    return document


async def test_from_the_first_one_to_a_disk(scenario, start_qemu, vm_dir, invariant):
    vm, place = await start_qemu(scenario), vm_dir / "backups"
    invariant.expect(STAYS)
    backup = ("backup", vm.monitor_path, place)
    first = await told("backup", *backup, "--disk", "vd0")
    second = await told("backup", *backup, "--verify", "--incremental")
    assert second["verified"]
    whens = [one["point"]["when"] for one in (first, second)]
    point = json.loads((place / f"{whens[1]}.json").read_text())
    Draft202012Validator(POINT).validate(point)
    assert point == second["point"]
    listed = await told("backup-list", "backup", "list", place)
    assert [one["when"] for one in listed["points"]] == whens
    checked = await told("backup-check", "backup", "check", place)
    assert checked["whole"]
    restored = await told("restore", "restore", place, vm_dir / "restored", "--at", whens[0])
    assert [one["disk"] for one in restored["disks"]] == ["vd0"]
    assert Path(restored["disks"][0]["target"]).is_file()


async def test_what_is_told_by_the_exit_code(scenario, start_qemu, vm_dir, invariant):
    vm, place = await start_qemu(scenario), vm_dir / "backups"
    invariant.expect(STAYS)
    backup = ("backup", vm.monitor_path, place)
    code, _, err = await cli(*backup, "--incremental")
    assert (code, "no backup of this disk yet" in err, place.exists()) == (2, True, False)
    code, out, err = await cli(*backup)
    assert code == 0, err
    assert "full: there is no backup of this disk yet" in out
    assert "the next one can be incremental, also when the VM was shut down" in out
    assert "backup of vd0: copying" in err
    [image] = place.glob("*.qcow2")
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    code, out, err = await cli(*backup)
    assert code == 4, err
    assert f"is full: of what it would lie on, {image.name} holds something else" in err
    code, out, err = await cli("backup", "check", place)
    assert code == 1, err
    assert "1 of 2 backups are whole" in out
    code, out, err = await cli("restore", place, vm_dir / "restored", "--at", image.name[:16])
    assert (code, (vm_dir / "restored").exists()) == (1, False), err
    for words in (("backup", "list", place, "--full"), (*backup, "--full", "--speed", "x")):
        assert (await cli(*words))[0] == 2
    assert (await cli("restore", place, vm_dir / "restored", "--at", "never"))[0] == 2
    assert image.stat().st_size > MIB


async def test_the_others_are_tested_while_one_is_made(scenario, start_qemu, vm_dir, invariant):
    """It is named, with who makes it, and nothing of it is damage."""
    vm, place = await start_qemu(scenario), vm_dir / "backups"
    invariant.expect(STAYS)
    first = await told("backup", "backup", vm.monitor_path, place)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        async with controller.backup(place, disks, kind="full", speed=MIB) as job:
            checked = await told("backup-check", "backup", "check", place)
            code, out, _ = await cli("backup", "check", place)
            await job.set_speed(0)
    assert job.result is not None
    assert checked["underway"]["when"] == job.result.point.when
    assert f"{os.getpid()} on " in checked["underway"]["by"]
    assert f"{job.result.point.when}.begun" in checked["underway"]["files"]
    assert [one["when"] for one in checked["points"]] == [first["point"]["when"]]
    assert (code, checked["whole"], checked["others"]) == (0, True, [])
    assert f"{job.result.point.when}: being made, by process {os.getpid()} on " in out
    checked = await told("backup-check", "backup", "check", place)
    assert (checked["underway"], len(checked["points"])) == (None, 2)
