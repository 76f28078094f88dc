"""What differs between the ends of a migration is found before anything is done: facts by facts.

The VMs stand still and have no guest: what is compared is what their QEMUs say of themselves.
"""

from __future__ import annotations

import json

import pytest
from disturbed import until

import qmpblock
from qmpblock.migration.compare import compare, pairs
from qmpblock.migration.describe import describe
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

SIZE = 8 << 20
UUID = "8ad1c4a0-5d3b-4c10-9d0e-3f1d2b7a6e55"
OTHER = "0b0e1a52-7c44-4a3e-8a55-0f6b6c1f9d11"
NAMES = ("d0", "d1", "d2")
SHARED = DiskTerms(copies=False)
#: A machine with what a guest may have: disks on two sorts of buses, one of them in an iothread.
DEVICES = (
    {"driver": "virtio-blk-pci", "id": "vd0", "drive": "d0", "addr": "4", "iothread": "io0"},
    {"driver": "virtio-scsi-pci", "id": "scsi0", "addr": "5"},
    {"driver": "scsi-hd", "id": "sd0", "bus": "scsi0.0", "lun": 1, "drive": "d1"},
    {"driver": "virtio-blk-pci", "id": "vd1", "drive": "d2", "addr": "6", "num-queues": 1},
)


def changed(**devices):
    """Return DEVICES with properties of some changed, by id; None leaves a device out."""
    return tuple(
        {
            name: value
            for name, value in {**one, **devices.get(one["id"], {})}.items()
            if value is not None
        }
        for one in DEVICES
        if devices.get(one["id"], one) is not None
    )


@pytest.fixture
def machine(start_qemu, vm_dir, qemu_binary):
    """Return what starts a VM of these parts, and reads what it is."""

    async def start(
        side,
        devices=DEVICES,
        *,
        images=None,
        incoming="defer",
        stands=True,
        named=NAMES,
        words=(),
        prepare=None,
    ):
        tools, arguments = Tools.of(qemu_binary), ["-uuid", UUID]
        for name in named:
            options = {"format": "qcow2", "size": SIZE, **(images or {}).get(name, {})}
            path = vm_dir / f"{side}-{name}"
            await tools.run(
                tools.img, "create", "-q", "-f", options["format"], str(path), str(options["size"])
            )
            if "bitmap" in options:
                await tools.run(tools.img, "bitmap", "--add", str(path), options["bitmap"])
            node = {"driver": options["format"], "node-name": name}
            file = {"driver": "file", "filename": str(options.get("file", path))}
            arguments += [
                "-blockdev",
                json.dumps({**node, "file": file, **options.get("node", {})}),
            ]
        arguments += ["-object", "iothread,id=io0"]
        for one in devices:
            arguments += ["-device", json.dumps(one)]
        kind = {} if side != "destination" else {"incoming": incoming}
        still = ["-S"] if stands else []
        vm = await start_qemu(**kind, extra=[*arguments, *still, *words])
        if prepare is not None:
            await prepare(vm)
        async with Connection.open(vm.monitor_path, NBDAccess()) as connection:
            return vm, await describe(connection)

    return start


def found(source, destination, terms=None):
    """Return what is found, by its kind."""
    result = {}
    for one in compare(source, destination, terms):
        result.setdefault(one.name, []).append(one.what)
    return result


async def test_the_same_machine_pairs(machine):
    _, source = await machine("source")
    _, destination = await machine("destination")
    assert found(source, destination) == {}
    assert [disk.name for disk, _ in pairs(source, destination)] == ["vd0", "sd0", "vd1"]
    # Another QEMU of the same machine type is the same machine, too.
    assert source.options["vmport"] == "on"
    assert source.features["CPUID 0x1 EDX"] != "0x0"
    assert source.blocks["pc.ram"].used == 16 << 20


async def test_what_is_told_at_once_is_what_is_told_one_by_one(machine, monkeypatch):
    vm, one = await machine("source")
    with monkeypatch.context() as patch:
        patch.setattr(Capabilities, "lists_values", False)
        async with Connection.open(vm.monitor_path, NBDAccess()) as connection:
            other = await describe(connection)
    assert (one.options, one.features) == (other.options, other.features)


async def test_devices(machine):
    """What QEMU notices at the hand-over, or never, is found in one look."""
    _, source = await machine("source")
    _, other = await machine(
        "destination",
        (
            *changed(vd0={"iothread": None}, scsi0={"addr": "7"}, vd1={"num-queues": 2})[:3],
            {**DEVICES[3], "num-queues": 2, "discard": False, "queue-size": 128},
            {"driver": "virtio-blk-pci", "id": "more", "drive": "d3", "addr": "9"},
        ),
        named=(*NAMES, "d3"),
    )
    seen = found(source, other)
    assert set(seen) == {
        "device-extra", "device-features", "disk-iothread", "device-missing",
        "device-properties", "device-queues",
    }  # fmt: skip
    [iothread] = seen["disk-iothread"]
    assert iothread.startswith("vd0 ")
    assert "in an iothread at the source only" in iothread
    [moved] = seen["device-missing"]
    assert (
        moved == "the destination has no virtio-scsi-pci scsi0 at PCI 05.0; it has one at PCI 07.0"
    )
    [features], [queues] = seen["device-features"], seen["device-queues"][-1:]
    assert "discard true, at the destination false" in features
    assert "num-queues 1, at the destination 2" in queues
    assert "queue-size 256, at the destination 128" in seen["device-properties"][0]
    assert any("more" in one for one in seen["device-extra"])


async def test_disks(machine):
    _, source = await machine("source", images={"d2": {"format": "raw"}})
    devices = (
        {**DEVICES[0], "id": "another"},
        DEVICES[1],
        {**DEVICES[2], "drive": "d1"},
        {"driver": "virtio-scsi-pci", "id": "scsi1", "addr": "6"},
    )
    same = source.disks[0].file
    _, other = await machine(
        "destination",
        devices,
        named=("d0", "d1"),
        images={"d0": {"file": same}, "d1": {"size": SIZE + 512, "node": {"read-only": True}}},
    )
    seen = found(source, other)
    assert set(seen) == {
        "device-id", "device-type", "disk-read-only", "disk-same", "disk-size"
    }  # fmt: skip
    assert "called another at the destination" in seen["device-id"][0]
    assert "virtio-blk-pci vd1" in seen["device-type"][0]
    assert "virtio-scsi-pci scsi1" in seen["device-type"][0]
    assert f"{SIZE} bytes at the source, {SIZE + 512} at the destination" in seen["disk-size"][0]
    assert "disk-same" not in found(source, other, SHARED)
    assert "disk-apart" in found(source, other, SHARED)


async def test_a_disk_that_others_may_write_to_is_not_copied(machine):
    shared = ({**DEVICES[0], "share-rw": True}, *DEVICES[1:])
    _, source = await machine("source", shared)
    _, destination = await machine("destination", shared)
    [what] = found(source, destination)["disk-shared"]
    assert "share-rw=on" in what
    assert "disk-shared" not in found(source, destination, SHARED)


async def test_the_machine(machine):
    words = ["-machine", "pc-i440fx-7.1,hpet=off", "-m", "32", "-smp", "2", "-cpu", "max"]
    _, source = await machine("source")
    _, other = await machine(
        "destination", incoming="defer", stands=False, words=[*words, "-uuid", OTHER]
    )
    seen = found(source, other)
    assert set(seen) >= {"cpu", "cpus", "destination-runs", "machine", "memory", "uuid"}
    assert "pc-i440fx-7.1 at the destination" in seen["machine"][0]
    assert "16777216 + 0 bytes at the source, 33554432" in seen["memory"][0]
    assert "CPUID 0x7.0 EBX" in seen["cpu"][0]
    assert "the source has 1 CPUs, the destination 2" in seen["cpus"][0]


async def test_what_hinders_a_migration(machine, vm_dir, invariant):
    """The source may not be migrated, and has bitmaps; the destination waits somewhere already."""

    async def hinder(vm):
        await vm.execute("block-dirty-bitmap-add", node="d0", name="kept", persistent=True)
        await vm.execute("block-dirty-bitmap-add", node="d2", name="taken")
        invariant.forget(vm)

    async def listen(vm):
        await vm.execute("migrate-incoming", uri=f"unix:{vm_dir}/early")
        invariant.forget(vm)

    vm, source = await machine("source", images={"d1": {"format": "vmdk"}}, prepare=hinder)
    _, destination = await machine(
        "destination",
        images={"d0": {"format": "raw"}, "d2": {"bitmap": "taken"}},
        prepare=listen,
    )
    seen = found(source, destination)
    filled = {"disk-filled"} if vm.version < (10, 0, 0) else set()
    assert set(seen) == {
        "bitmap-exists",
        "bitmap-lost",
        "destination-listens",
        "source-blocked",
    } | (filled)
    assert "vmdk" in seen["source-blocked"][0]
    assert "kept" in seen["bitmap-lost"][0]
    assert "taken" in seen["bitmap-exists"][0]
    _, running = await machine("other")
    assert "destination-state" in found(source, running)


async def test_stop_has_a_destination_stay_paused(start_qemu, vm_dir, invariant):
    """As -S does: where nothing tells whether it was given, that can be had."""
    states = {}
    for number, stops in enumerate((False, True)):
        source, destination = await start_qemu(), await start_qemu(incoming="defer")
        invariant.forget(source)
        invariant.forget(destination)
        if stops:
            assert await destination.execute("stop") == {}
        uri = f"unix:{vm_dir}/m{number}"
        await destination.execute("migrate-incoming", uri=uri)
        assert "socket-address" in await destination.execute("query-migrate")
        assert (await destination.execute("query-status"))["status"] == "inmigrate"
        await source.execute("migrate", uri=uri)
        await until(lambda of=destination: arrived(of), "the destination")
        states[stops] = (await destination.execute("query-status"))["status"]
    assert states == {False: "running", True: "paused"}


async def arrived(vm):
    return (await vm.execute("query-status"))["status"] != "inmigrate"


async def test_without_s_it_stays_paused_all_the_same(
    machine, start_qemu, invariant, monkeypatch, vm_dir, qemu_binary
):
    """Where nothing tells that a destination would run by itself, it is told not to."""
    monkeypatch.setattr("qmpblock.migration.describe.command_line", lambda pid: ())
    vms = {}
    for side in ("source", "destination"):
        vms[side], seen = await machine(side, stands=False)
        assert seen.paused is None
        invariant.forget(vms[side])
    async with (
        qmpblock.connect(vms["source"].monitor_path) as source,
        qmpblock.connect(vms["destination"].monitor_path) as destination,
        qmpblock.migrate(source, destination),
    ):
        pass
    said = [line for line in vms["destination"].qmp_log() if '"cont"' in line or "RESUME" in line]
    assert '"cont"' in said[0]
    assert any("RESUME" in line for line in said)
