"""What speaks against a migration, by what real QEMUs said of the same machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import QEMUS, recorded, waiting

from qmpblock.graph.model import Bitmap
from qmpblock.migration.compare import compare, pairs
from qmpblock.migration.devicetree import GuestDevice
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.machine import Block, LowerLayer, Machine
from qmpblock.migration.mismatch import KINDS

SAME = DiskTerms(copies=False)
TOP = DiskTerms(layers="top")


def found(source: Machine, destination: Machine, **options) -> dict[str, str]:
    return {one.name: one.what for one in compare(source, destination, **options)}


def with_disk(machine: Machine, number: int = 0, **more) -> Machine:
    disks = list(machine.disks)
    disks[number] = replace(disks[number], **more)
    return replace(machine, disks=tuple(disks))


def with_device(machine: Machine, ending: str, **more) -> Machine:
    devices = tuple(
        replace(one, **more) if one.place.endswith(ending) else one for one in machine.devices
    )
    return replace(machine, devices=devices)


def with_shared(machine: Machine) -> Machine:
    place = machine.disks[0].place
    [device] = [one for one in machine.devices if one.place == place]
    return with_device(machine, place, properties={**device.properties, "share-rw": "true"})


SOURCE = recorded("7.2.22")
DESTINATION = waiting("7.2.22")


@pytest.mark.parametrize("source", QEMUS)
@pytest.mark.parametrize("destination", QEMUS)
def test_every_qemu_says_the_same_of_one_machine(source, destination):
    older = (source, destination) == ("11.1.2", "7.2.22")
    assert list(found(recorded(source), waiting(destination))) == (["older"] if older else [])
    names = [disk.name for disk, _ in pairs(recorded(source), waiting(destination))]
    assert names == ["vd0", "sd0", "vd1"]


def test_a_place_has_no_name_in_it_that_somebody_chose():
    [disk] = [one for one in SOURCE.devices if one.id == "sd0"]
    assert disk.place == "/System:i440FX-pcihost/PCI:05.0/virtio-pci-bus:0/SCSI:0:0:1"
    assert disk.where == "SCSI 0:0:1 of PCI 05.0"
    assert disk.describe() == "scsi-hd sd0 at SCSI 0:0:1 of PCI 05.0"
    assert disk.bus == "scsi0.0"
    assert disk.properties["lun"] == "1"
    assert disk.properties["product"] == "QEMU HARDDISK"


BITMAP = Bitmap("p0", 65536, recording=True, persistent=True)
WITHOUT = {name: on for name, on in SOURCE.capabilities.items() if name != "dirty-bitmaps"}
GONE = tuple(one for one in SOURCE.devices if "PCI:06.0" not in one.place)
#: Of each kind: what is changed, at the source and at the destination, and a word of what is said.
CASES = {
    "source-state": (replace(SOURCE, elsewhere="it was migrated away"), DESTINATION, "away"),
    "source-blocked": (replace(SOURCE, blocked=("no way",)), DESTINATION, "no way"),
    "source-job": (with_disk(SOURCE, jobs=("backup",)), DESTINATION, "runs backup"),
    "destination-state": (SOURCE, replace(DESTINATION, status="running"), "says running"),
    "destination-listens": (SOURCE, replace(DESTINATION, listens=True), "already"),
    "destination-runs": (SOURCE, replace(DESTINATION, paused=False), "without -S"),
    "machine-unknown": (replace(SOURCE, type="pc-i440fx-9.9"), DESTINATION, "does not know"),
    "machine": (replace(SOURCE, type="pc-i440fx-7.1"), DESTINATION, "pc-i440fx-7.1"),
    "machine-options": (
        SOURCE,
        replace(DESTINATION, options={**SOURCE.options, "hpet": "off"}),
        "hpet on, at the destination off",
    ),
    "older": (recorded("11.1.2"), DESTINATION, "QEMU 7.2.22"),
    "uuid": (SOURCE, replace(DESTINATION, uuid=""), "nothing at the destination"),
    "memory": (SOURCE, replace(DESTINATION, memory=32 << 20), "33554432"),
    "memory-blocks": (
        SOURCE,
        replace(DESTINATION, blocks={**SOURCE.blocks, "pc.bios": Block(1, 1)}),
        "pc.bios has 65536 bytes, there 1",
    ),
    "cpus": (SOURCE, replace(DESTINATION, cpus=frozenset({"a", "b"})), "1 CPUs, the destination 2"),
    "cpu": (
        SOURCE,
        replace(DESTINATION, features={**SOURCE.features, "CPUID 0x1 EDX": "0x1"}),
        "CPUID 0x1 EDX",
    ),
    "cpu-name": (SOURCE, replace(DESTINATION, cpu="host"), "qemu64 at the source, host"),
    "device-missing": (SOURCE, replace(DESTINATION, devices=GONE), "no virtio-blk-pci vd1"),
    "device-extra": (replace(SOURCE, devices=GONE), DESTINATION, "only the destination has"),
    "device-type": (SOURCE, with_device(DESTINATION, "/PCI:06.0", type="nvme"), "a nvme vd1"),
    "device-features": (
        SOURCE,
        with_device(DESTINATION, "/PCI:06.0/virtio-pci-bus:0", properties={"discard": "false"}),
        "discard true, at the destination false",
    ),
    "device-queues": (
        SOURCE,
        with_device(DESTINATION, "/PCI:06.0/virtio-pci-bus:0", properties={"num-queues": "4"}),
        "num-queues 1, at the destination 4",
    ),
    "device-properties": (
        SOURCE,
        with_device(DESTINATION, "/PCI:06.0/virtio-pci-bus:0", properties={"queue-size": "64"}),
        "queue-size 256, at the destination 64",
    ),
    "device-id": (SOURCE, with_device(DESTINATION, "/PCI:06.0", id="x"), "is called x"),
    "disk-iothread": (SOURCE, with_disk(DESTINATION, iothread=None), "at the source only"),
    "disk-place": (with_disk(SOURCE, place=""), DESTINATION, "of the source"),
    "disk-size": (SOURCE, with_disk(DESTINATION, size=1), "8388608 bytes at the source, 1 at"),
    "disk-read-only": (SOURCE, with_disk(DESTINATION, read_only=True), "at the destination"),
    "disk-medium": (SOURCE, with_disk(DESTINATION, size=None), "at the source only"),
    "disk-same": (
        with_disk(SOURCE, identity=(1, 2)),
        with_disk(DESTINATION, identity=(1, 2)),
        "very same file",
    ),
    "disk-shared": (with_shared(SOURCE), DESTINATION, "share-rw=on"),
    "disk-plaintext": (with_disk(SOURCE, encrypted=True), DESTINATION, "is encrypted"),
    "disk-filled": (SOURCE, with_disk(DESTINATION, format="raw", holes=False), "discard=ignore"),
    "bitmap-lost": (SOURCE, with_disk(DESTINATION, format="raw", keeps_bitmaps=False), "raw"),
    "bitmap-exists": (SOURCE, with_disk(DESTINATION, stored=frozenset({"p0"})), "there already"),
    "bitmap-unusable": (
        with_disk(SOURCE, bitmaps=(replace(BITMAP, busy=True),)),
        DESTINATION,
        "p0",
    ),
    "bitmap-left": (with_disk(SOURCE, lower=(BITMAP,)), DESTINATION, "not written to"),
    "snapshot-left": (
        with_disk(SOURCE, snapshots=("before", "after")),
        DESTINATION,
        "before, after",
    ),
    "capability-unknown": (replace(SOURCE, capabilities=WITHOUT), DESTINATION, "dirty-bitmaps"),
    "capability-differs": (
        SOURCE,
        replace(DESTINATION, capabilities={**SOURCE.capabilities, "multifd": True}),
        "multifd is on at the destination only",
    ),
}
BASE = LowerLayer("base", "raw", 8 << 20, ((1, 2),))
OVER = with_disk(SOURCE, below=(BASE,))
LIES = with_disk(DESTINATION, below=(BASE,), names_backing=True)
FULL = DiskTerms(allocation="full")
#: Where active layers alone are copied: the destination, and a word of what is said.
TOPS = {
    "backing-missing": (with_disk(LIES, below=()), "lies on none"),
    "backing-size": (with_disk(LIES, below=(replace(BASE, size=1),)), "and 1 what"),
    "backing-unproven": (with_disk(LIES, below=(replace(BASE, files=None),)), "which files"),
    "backing-unnamed": (with_disk(LIES, names_backing=False), "does not say"),
}
SHARED = {
    "disk-apart": (
        with_disk(SOURCE, identity=(1, 2)),
        with_disk(DESTINATION, identity=(1, 3)),
        "at the destination",
    ),
}
LATER = {"room"}  # not told by the machines: tests/migration/test_predict.py


def test_the_pair_without_a_change_has_no_finding():
    assert compare(SOURCE, DESTINATION) == ()


@pytest.mark.parametrize("name", CASES)
def test_each_mismatch_is_found_and_no_other(name):
    source, destination, words = CASES[name]
    seen = found(source, destination)
    assert list(seen) == [name]
    assert words in seen[name]


@pytest.mark.parametrize("name", SHARED)
def test_each_mismatch_of_shared_images(name):
    source, destination, words = SHARED[name]
    assert words in found(source, destination, terms=SAME)[name]


@pytest.mark.parametrize("name", TOPS)
def test_each_mismatch_of_what_images_lie_on(name):
    destination, words = TOPS[name]
    seen = found(OVER, destination, terms=TOP)
    assert list(seen) == [name]
    assert words in seen[name]
    assert found(OVER, destination) == {}
    assert found(OVER, destination, terms=SAME) == {}


def test_an_image_that_cannot_have_the_host_space_that_is_asked_for():
    assert "has 0 bytes of 8388608" in found(SOURCE, DESTINATION, terms=FULL)["space"]
    held = replace(DESTINATION, disks=tuple(replace(one, taken=8 << 20) for one in SOURCE.disks))
    assert "space" not in found(SOURCE, held, terms=FULL)


@pytest.mark.parametrize("terms", [DiskTerms(), TOP])
def test_no_image_of_the_source_is_copied_to(terms):
    """Neither one that a disk lies on, nor another disk's; nor one that lies on a disk's own."""
    below = (LowerLayer("below", "qcow2", 8 << 20, ((1, 2),)),)
    mine = with_disk(with_disk(SOURCE, identity=(1, 3), below=below), 1, identity=(1, 4))
    for identity in ((1, 2), (1, 4)):
        there = with_disk(DESTINATION, identity=identity, below=below, names_backing=True)
        assert "which a disk of the source is in" in found(mine, there, terms=terms)["disk-same"]
    on = (LowerLayer("on", "qcow2", 8 << 20, ((1, 3),)),)
    there = with_disk(DESTINATION, identity=(1, 9), below=on, names_backing=True)
    assert "lies on" in found(mine, there, terms=terms)["disk-same"]


def test_what_can_only_be_read_may_be_the_same():
    mine = with_disk(SOURCE, identity=(1, 3), read_only=True)
    assert found(mine, with_disk(DESTINATION, identity=(1, 3), read_only=True)) == {}


def test_what_the_guest_has_set_itself_does_not_speak_against_it():
    """A q35 that has booted has put its PCI Express configuration space somewhere; a pc its SMBus.

    SeaBIOS does the latter on every pc.
    """
    place = "/PCI:06.0/virtio-pci-bus:0"
    mine = {"MCFG": "2952790016", "busnr": "1", "smb_io_base": "1792"}
    made = {"MCFG": "-1", "busnr": "0", "smb_io_base": "45312"}
    mine = with_device(SOURCE, place, properties=mine)
    waits = with_device(DESTINATION, place, properties=made)
    assert compare(mine, waits) == ()


def test_of_an_image_that_both_have_persistent_bitmaps_are_there_by_themselves():
    mine = with_disk(SOURCE, bitmaps=(BITMAP,), read_only=True)
    there = with_disk(DESTINATION, stored=frozenset({"p0"}), read_only=True)
    assert compare(mine, there) == ()
    lower = with_disk(SOURCE, lower=(BITMAP, replace(BITMAP, name="t", persistent=False)))
    shared = with_disk(DESTINATION, stored=frozenset({"p0"}))
    [one] = compare(lower, shared, terms=SAME)
    assert one.name == "bitmap-left"
    assert "bitmap t of" in one.what
    busy = with_disk(SOURCE, bitmaps=(replace(BITMAP, busy=True),))
    assert list(found(busy, shared, terms=SAME)) == ["bitmap-unusable"]


def test_every_kind_is_found_by_a_case():
    assert {*CASES, *SHARED, *TOPS, *LATER, "space"} == set(KINDS)


def test_disks_of_unknown_places_are_no_pair():
    """Two such are not taken for one and the same."""
    source, destination = with_disk(SOURCE, place=""), with_disk(DESTINATION, place="", size=1)
    assert list(found(source, destination)) == ["disk-place"]
    assert [disk.name for disk, _ in pairs(source, destination)] == ["sd0", "vd1"]


def test_refusals_come_first():
    destination = with_device(replace(DESTINATION, uuid=""), "/PCI:06.0", id="x")
    first, second = compare(SOURCE, destination)
    assert (first.refused, second.refused) == (True, False)


def test_what_hangs_on_a_device_that_is_not_there_is_not_told_apart():
    devices = tuple(one for one in SOURCE.devices if "PCI:05.0" not in one.place)
    seen = compare(SOURCE, replace(DESTINATION, devices=devices))
    assert [one.name for one in seen] == ["device-missing"]
    seen = compare(replace(SOURCE, devices=devices), DESTINATION)
    assert [one.name for one in seen] == ["device-extra"]


def test_a_device_that_is_elsewhere_is_said_to_be():
    moved = tuple(
        replace(one, place=one.place.replace("PCI:06.0", "PCI:0a.0")) for one in SOURCE.devices
    )
    seen = found(SOURCE, replace(DESTINATION, devices=moved))
    assert seen["device-missing"].endswith("it has one at PCI 0a.0")


@pytest.mark.parametrize(
    ("block", "other", "fits"),
    [
        (Block(4096, 4096), Block(4096, 4096), True),
        (Block(4096, 4096), Block(8192, 8192), False),
        (Block(4096, 8192), Block(8192, 16384), True),
        (Block(8192, 8192), Block(4096, 8192), True),
        (Block(16384, 16384), Block(4096, 8192), False),
    ],
)
def test_a_block_that_can_grow_takes_what_is_no_more_than_it_can(block, other, fits):
    source, destination = (
        replace(machine, blocks={"x": one})
        for machine, one in ((SOURCE, block), (DESTINATION, other))
    )
    assert (compare(source, destination) == ()) is fits


def test_names_of_a_peer_are_escaped():
    device = GuestDevice("/System:x", "evil\x1b[2J", "", "main-system-bus")
    seen = found(replace(SOURCE, devices=(device,)), replace(DESTINATION, devices=()))
    assert "\x1b" not in seen["device-missing"]


def test_others_may_write_to_a_disk_that_is_not_copied():
    shared = with_shared(SOURCE)
    assert "disk-shared" not in found(shared, DESTINATION, terms=SAME)
    assert "disk-shared" not in found(with_disk(shared, read_only=True), DESTINATION)
