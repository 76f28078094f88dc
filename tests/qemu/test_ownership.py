"""Whose images these are, from what QEMU says. Real migrations: live/test_ownership.py."""

from typing import get_args

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.errors import UnsupportedError
from qmpblock.graph.model import Device
from qmpblock.managers import Verb, Work
from qmpblock.qemu.ownership import Owner, ask, ask_for_change, inactive_devices, look, situation

# qapi/run-state.json, all of QEMU 7.2 and 11.1.
STATES = {
    "debug": Owner.THIS,
    "inmigrate": Owner.SOURCE,
    "internal-error": Owner.THIS,
    "io-error": Owner.THIS,
    "paused": Owner.THIS,
    "postmigrate": Owner.GONE,
    "prelaunch": Owner.THIS,
    "finish-migrate": Owner.LEAVING,
    "restore-vm": Owner.LEAVING,
    "running": Owner.THIS,
    "save-vm": Owner.LEAVING,
    "shutdown": Owner.THIS,
    "suspended": Owner.THIS,
    "watchdog": Owner.THIS,
    "guest-panicked": Owner.THIS,
    "colo": Owner.LEAVING,
    "a state of QEMU 20": Owner.UNKNOWN,
}
# qapi/migration.json, likewise, of a VM that runs.
MIGRATIONS = {
    "none": Owner.THIS,
    "setup": Owner.LEAVING,
    "cancelling": Owner.LEAVING,
    "cancelled": Owner.THIS,
    "active": Owner.LEAVING,
    "postcopy-device": Owner.LEAVING,
    "postcopy-active": Owner.LEAVING,
    "postcopy-paused": Owner.LEAVING,
    "postcopy-recover": Owner.LEAVING,
    "postcopy-recover-setup": Owner.LEAVING,
    "completed": Owner.THIS,
    "failed": Owner.THIS,
    "failing": Owner.LEAVING,
    "colo": Owner.LEAVING,
    "pre-switchover": Owner.LEAVING,
    "device": Owner.LEAVING,
    "wait-unplug": Owner.LEAVING,
    "a state of QEMU 20": Owner.LEAVING,
}


@pytest.mark.parametrize(("status", "owner"), STATES.items())
def test_every_run_state(status, owner):
    found = situation(status, "none")
    assert found.owner is owner
    assert bool(found.why) == bool(found.remedy) == (owner is not Owner.THIS)


@pytest.mark.parametrize(("migration", "owner"), MIGRATIONS.items())
def test_every_state_of_a_migration_of_a_running_vm(migration, owner):
    assert situation("running", migration).owner is owner
    assert situation("paused", migration).owner is owner


@pytest.mark.parametrize("migration", MIGRATIONS)
def test_no_state_of_a_migration_gives_the_images_back(migration):
    """A destination whose migration failed waits still; a source that is gone is gone."""
    assert situation("inmigrate", migration).owner is Owner.SOURCE
    assert situation("postmigrate", migration).owner is Owner.GONE
    assert situation("finish-migrate", migration).owner is Owner.LEAVING


def test_inactive_images():
    found = situation("paused", "completed", ["vd0", "vd\x1b1"])
    assert found.owner is Owner.SOURCE
    assert r"vd0, vd\x1b1 are inactive" in found.why


def test_a_state_that_nobody_has_heard_of_is_shown_safely():
    assert "\x1b" not in situation("\x1b[2J", "none").why


PATH = "/machine/peripheral/vd0/virtio-backend"


def debug_graph(name, *perm):
    return {
        "nodes": [
            {"id": 1, "type": "block-backend", "name": name},
            {"id": 2, "type": "block-driver", "name": "d0"},
            {"id": 3, "type": "block-backend", "name": "of no device"},
            {"id": 4, "type": "block-job", "name": name},
        ],
        "edges": [
            {"parent": 1, "child": 2, "name": "root", "perm": list(perm), "shared-perm": []},
            {"parent": 2, "child": 2, "name": "file", "perm": [], "shared-perm": []},
            {"parent": 3, "child": 2, "name": "root", "perm": [], "shared-perm": []},
            {"parent": 4, "child": 2, "name": "main node", "perm": [], "shared-perm": []},
        ],
    }


@pytest.mark.parametrize(
    ("drive", "read_only", "perm", "inactive"),
    [
        (None, False, (), True),
        (None, False, ("consistent-read", "write"), False),
        (None, False, ("consistent-read",), False),  # a CD drive with an image that is not
        (None, True, ("consistent-read",), False),
        (None, True, (), True),
        ("drive1", False, ("consistent-read",), True),  # 7.2's, of one that waits
        ("drive1", False, ("consistent-read", "write"), False),
        ("drive1", True, ("consistent-read",), False),
    ],
)
def test_inactive_is_what_has_no_permission(drive, read_only, perm, inactive):
    device = Device("vd0", drive, PATH, removable=False, read_only=read_only, chain=None)
    found = inactive_devices(debug_graph(drive or PATH, *perm), [device])
    assert found == (("vd0",) if inactive else ())


def test_a_device_that_the_graph_does_not_show_is_not_inactive():
    device = Device("vd0", None, PATH, removable=False, read_only=False, chain=None)
    assert inactive_devices(debug_graph("vd1"), [device]) == ()


# -- asking


async def test_asking_a_fake(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0", "vd0")) as (vm, qemu):
        monitor = vm.monitor
        await ask(monitor)
        qemu["query-migrate"] = {"return": {"status": "active"}}
        with pytest.raises(UnsupportedError, match="query-migrate active") as caught:
            await ask(monitor)
        assert caught.value.standing == "nothing was touched"
        assert "migrate_cancel" in caught.value.remedy
        with pytest.raises(UnsupportedError) as caught:
            await ask(monitor, standing=None)
        assert caught.value.standing is None


async def test_a_paused_vm_is_asked_whether_its_images_are_active(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0")) as (vm, qemu):
        [device] = (await vm.graph()).devices
        qemu["query-status"] = {"return": {"status": "paused", "running": False}}
        plain = qemu.get

        def get(command, default=None):
            if command == "x-debug-query-block-graph":
                return {"return": debug_graph(device.qom_path)}
            return plain(command, default)

        qemu.get = get
        assert (await look(vm.monitor)).owner is Owner.THIS  # of no disk in particular
        with pytest.raises(UnsupportedError, match="the images of vd0 are inactive"):
            await ask(vm.monitor, [device])

        def gone(command, default=None):
            if command == "x-debug-query-block-graph":
                return {"error": {"class": "CommandNotFound", "desc": "no such command"}}
            if command == "query-block":
                inserted = {"node-name": "d0", "active": False}
                return {"return": [{"qdev": device.qom_path, "device": "", "inserted": inserted}]}
            return plain(command, default)

        qemu.get = gone
        with pytest.raises(UnsupportedError, match="the images of vd0 are inactive"):
            await ask(vm.monitor, [device])


async def test_a_managed_chain_is_not_changed(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0", "vd0")) as (vm, qemu):
        work = Work("snapshot", "/images/d0")
        await ask_for_change(vm, work)
        qemu["query-chardev"] = {
            "return": [{"label": "charmonitor", "filename": "unix:/x,server=on"}]
        }
        qemu["query-name"] = {"return": {"name": "web 1"}}
        with pytest.raises(UnsupportedError, match="managed by libvirt") as caught:
            await ask_for_change(vm, work)
        assert caught.value.standing == "nothing was touched"
        assert "virsh snapshot-create-as 'web 1' --disk-only" in caught.value.remedy
        assert "--unmanaged" in caught.value.remedy
        vm.unmanaged = True
        await ask_for_change(vm, work)


@pytest.mark.parametrize("driver", ["alloc-track", "zeroinit"])
async def test_a_disk_that_proxmox_is_at_work_on_is_not_looked_into(driver, tmp_path):
    """Its QEMU's own drivers, of which no other knows."""
    drawing = chain("d0", "d1").device("d0", "vd0")
    async with fake_vm(tmp_path / "q", drawing) as (vm, _):
        await ask(vm.monitor, (await vm.graph()).devices)
        drawing.nodes["d0"]["drv"] = driver
        with pytest.raises(UnsupportedError, match=f"the node d0 .* driver {driver}") as caught:
            await ask(vm.monitor, (await vm.graph()).devices)
    assert "live restore" in caught.value.remedy


async def test_by_turns_a_chain_is_not_changed_even_if_its_manager_is_told_afterwards(tmp_path):
    path = tmp_path / "qemu-server" / "104.qmp"
    path.parent.mkdir()
    async with fake_vm(path, chain("d0").device("d0", "vd0")) as (vm, qemu):
        qemu["query-chardev"] = {"return": [{"label": "x", "filename": f"unix:{path},server=on"}]}
        qemu["query-name"] = {"return": {}}
        with pytest.raises(UnsupportedError, match="managed by Proxmox VE") as caught:
            await ask_for_change(vm, Work("snapshot", "/images/d0"))
        assert "qm snapshot 104 NAME" in caught.value.remedy
        vm.unmanaged = True
        for verb in set(get_args(Verb)) - {"backup", "copy", "point"}:
            with pytest.raises(UnsupportedError, match="others have in between") as caught:
                await ask_for_change(vm, Work(verb, "/images/d0"))
            assert "qm set 104 --args" in caught.value.remedy
            assert caught.value.standing == "nothing was touched"
