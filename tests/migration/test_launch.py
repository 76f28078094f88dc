"""A destination's command line: what it is made of. That QEMU takes it, live tests see."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from machines import recorded

from qmpblock.errors import GraphError, UnsupportedError
from qmpblock.graph.model import Chain, DiskDevice, Layer, Node
from qmpblock.migration.launch import Origin, Property, launch

SOURCE = recorded("7.2.22")
WORDS = ("qemu-system-x86_64", "-machine", "pc", "-m", "16", "-device", "gone")


def device(name: str, driver: str = "qcow2", **more) -> DiskDevice:
    node = Node(f"node-{name}", driver, f"/images/{name}", 8 << 20, read_only=False, **more)
    layer = Layer(0, node, None)
    path = f"/machine/peripheral/{name}"
    return DiskDevice(name, None, path, False, False, Chain((), (layer,), (0,), (node.size,)))


DEFAULTS = {
    kind: {
        "addr": Property("str", -1),
        "num-queues": Property("uint16", 65535),
        "discard": Property("bool", True),
        "queue-size": Property("uint16", 256),
        "lun": Property("uint32", 4294967295),
        "x-secret": Property("bool", True),
    }
    for kind in ("virtio-blk-pci", "virtio-scsi-pci", "scsi-hd")
}
ORIGIN = Origin(
    SOURCE,
    words=WORDS,
    plugged=frozenset({"vd0", "vd1", "sd0", "scsi0"}),
    defaults=DEFAULTS,
    iothreads={"vd0": {"iothread": "io0"}},
    disks=tuple(device(name) for name in ("vd0", "sd0", "vd1")),
)


def made(origin: Origin = ORIGIN, **options):
    return launch(origin, directory="/new", sockets="/run/new", **options)


def over(one: DiskDevice, **more) -> DiskDevice:
    """Return a disk whose image lies on another one."""
    base = Layer(1, Node("base", "raw", "/images/base", 8 << 20, read_only=True), None)
    base = replace(base, node=replace(base.node, **more))
    return replace(one, chain=replace(one.chain, layers=(*one.chain.layers, base)))


def values(words, option: str) -> list[str]:
    return [value for word, value in pairwise(words) if word == option]


def test_devices_are_where_the_guest_finds_them_and_otherwise_as_by_default():
    plan = made()
    devices = [json.loads(value) for value in values(plan.words, "-device")]
    assert devices == [
        {"driver": "virtio-blk-pci", "id": "vd0", "bus": "pci.0", "addr": "04.0", "num-queues": 1}
        | {"drive": "node-vd0", "iothread": "io0"},
        {"driver": "virtio-scsi-pci", "id": "scsi0", "bus": "pci.0", "addr": "05.0"},
        {"driver": "scsi-hd", "id": "sd0", "bus": "scsi0.0", "lun": 1, "drive": "node-sd0"},
        {"driver": "virtio-blk-pci", "id": "vd1", "bus": "pci.0", "addr": "06.0", "num-queues": 1}
        | {"drive": "node-vd1"},
    ]
    assert values(plan.words, "-machine") == ["pc", "pc-i440fx-7.2"]
    assert plan.words[-3:] == ("-S", "-incoming", "defer")
    assert plan.monitor == "/run/new/qmp"
    assert [image.file for image in plan.images] == [
        "/new/vd0.qcow2", "/new/sd0.qcow2", "/new/vd1.qcow2"
    ]  # fmt: skip
    assert {image.size for image in plan.images} == {8 << 20}


def test_keys_are_named_and_not_shown():
    words = (*WORDS, "-object", "secret,id=k,data=sesame", "-object", "rng-random,id=r")
    plan = made(replaced(words=words, others={"k": "secret", "r": "rng-random", "late": "can-bus"}))
    assert "sesame" not in " ".join(plan.words)
    assert values(plan.words, "-object") == [
        '{"qom-type": "secret", "id": "k", "file": "/run/new/k.key"}',
        "rng-random,id=r",
    ]
    assert len(plan.missing) == 2
    assert "k.key" in plan.missing[0]
    assert "late" in plan.missing[1]


def test_a_format_that_cannot_be_made_becomes_qcow2_and_raw_stays_raw():
    disks = (device("vd0", "vmdk"), device("sd0", "raw"), device("vd1"))
    assert [image.format for image in made(replaced(disks=disks)).images] == [
        "qcow2", "raw", "qcow2"
    ]  # fmt: skip


def test_an_encrypted_image_stays_encrypted():
    file = 'json:{"driver": "qcow2", "encrypt.key-secret": "k"}'
    disks = (device("sd0"), device("vd1"))
    node = Node("n", "qcow2", file, 8 << 20, read_only=False, encrypted=True)
    chain = Chain((), (Layer(0, node, None),), (0,), (node.size,))
    secret = DiskDevice("vd0", None, "/machine/peripheral/vd0", False, False, chain)
    plan = made(replaced(disks=(secret, *disks)))
    assert plan.images[0].secret == "k"
    described = json.loads(values(plan.words, "-blockdev")[0])
    assert described["encrypt"] == {"format": "luks", "key-secret": "k"}
    with pytest.raises(UnsupportedError, match="encrypted"):
        made(replaced(disks=(device("vd0", encrypted=True), *disks)))


def test_a_format_that_is_asked_for_is_that_of_all_but_what_is_encrypted():
    file = 'json:{"driver": "luks", "key-secret": "k"}'
    node = Node("n", "luks", file, 8 << 20, read_only=False, encrypted=True)
    chain = Chain((), (Layer(0, node, None),), (0,), (node.size,))
    secret = DiskDevice("sd0", None, "/machine/peripheral/sd0", False, False, chain)
    disks = (device("vd0"), secret, device("vd1", "raw"))
    plan = launch(replaced(disks=disks), directory="/new", sockets="/run/new", format="raw")
    assert sorted((image.file, image.format) for image in plan.images) == [
        ("/new/sd0.luks", "luks"), ("/new/vd0.raw", "raw"), ("/new/vd1.raw", "raw")
    ]  # fmt: skip
    assert any("sd0 is encrypted: its image stays luks" in note for note in plan.notes)
    plan = launch(ORIGIN, directory="/new", sockets="/run/new", format="qcow2")
    nodes = [json.loads(value) for value in values(plan.words, "-blockdev")]
    assert [node["driver"] for node in nodes] == ["qcow2"] * 3


def test_what_the_monitor_alone_tells():
    plan = made(replaced(words=(), kvm=True, name="a,b", firmware="/bios"))
    assert values(plan.words, "-accel") == ["kvm"]
    assert values(plan.words, "-cpu") == ["qemu64"]
    assert values(plan.words, "-m") == ["16777216B"]
    assert values(plan.words, "-name") == ["a,,b"]
    assert values(plan.words, "-bios") == ["/bios"]
    assert values(plan.words, "-smp") == ["cpus=1,maxcpus=1,sockets=1,cores=1,threads=1"]
    assert "cannot be seen" in plan.notes[0]


def test_a_disk_that_went_meanwhile():
    with pytest.raises(GraphError, match="vd1 has gone"):
        made(replaced(disks=ORIGIN.disks[:2]))


def replaced(**more) -> Origin:
    return replace(ORIGIN, **more)


def test_of_a_chain_whose_active_layer_goes_the_image_lies_on_the_same():
    chains = (over(ORIGIN.disks[0]), *ORIGIN.disks[1:])
    plan = made(replaced(disks=chains), layers="top")
    [first, *others] = plan.images
    assert (first.format, first.backing, first.backing_format) == ("qcow2", "/images/base", "raw")
    assert {one.backing for one in others} == {None}
    assert {one.backing for one in made(replaced(disks=chains)).images} == {None}


@pytest.mark.parametrize(
    ("base", "options", "word"),
    [
        ({"filename": "base"}, {}, "base is no absolute name"),
        ({"filename": 'json:{"driver": "raw", "offset": 512}'}, {}, "is no absolute name"),
        ({}, {"format": "raw"}, "a raw image lies on none"),
    ],
)
def test_what_no_header_can_say_is_refused(base, options, word):
    disks = (over(ORIGIN.disks[0], **base), *ORIGIN.disks[1:])
    with pytest.raises(UnsupportedError, match=word):
        made(replaced(disks=disks), layers="top", **options)
