"""The command line says what the scenario says; the live tests start each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmpblock.testing.commandline import disk_arguments
from qmpblock.testing.images import BuiltDisk, BuiltImage
from qmpblock.testing.scenario import parse_scenario


def arguments(text: str) -> list[tuple[str, Any]]:
    scenario = parse_scenario(f"about: Test.\n{text}", "test")
    disks = []
    for disk in scenario.disks:
        built = None
        for image in disk.images:
            secret = None if image.secret is None else ("secret-0", image.secret)
            built = BuiltImage(image, Path("/d") / image.file, built, secret=secret)
        assert built is not None
        disks.append(BuiltDisk(disk, built))
    flat = disk_arguments(disks, scenario.machine, empty_tray=scenario.empty_tray)
    return [
        (option, json.loads(value) if value.startswith("{") else value)
        for option, value in zip(flat[::2], flat[1::2], strict=True)
    ]


def test_a_blockdev_chain_has_names_by_depth() -> None:
    blockdev, device = arguments("images: [{size: 1M}, {}]")
    assert blockdev == (
        "-blockdev",
        {
            "driver": "qcow2",
            "node-name": "d0",
            "discard": "ignore",
            "file": {
                "driver": "file",
                "node-name": "d0-file",
                "filename": "/d/d0-1.qcow2",
                "discard": "ignore",
            },
            "backing": {
                "driver": "qcow2",
                "node-name": "d0-1",
                "file": {
                    "driver": "file",
                    "node-name": "d0-1-file",
                    "filename": "/d/d0-0.qcow2",
                },
            },
        },
    )
    assert device == ("-device", {"driver": "virtio-blk-pci", "drive": "d0", "id": "vd0"})


def test_filters_stand_in_the_order_given() -> None:
    found = arguments("images: [{size: 1M}]\nattach: {filters: [throttle, copy-on-read]}")
    root = found[1][1]
    assert root["node-name"] == "d0-throttle"
    assert root["file"]["node-name"] == "d0-copy-on-read"
    assert root["file"]["file"]["node-name"] == "d0"
    assert found[2][1]["drive"] == "d0-throttle"


def test_a_legacy_drive_doubles_commas_and_never_probes() -> None:
    ((option, value), _) = arguments(
        "images: [{size: 1M, format: raw, file: 'a,b'}, {file: 'c,d', backing_format: no}]\n"
        "attach: {style: drive}"
    )
    assert option == "-drive"
    assert value == "file=/d/c,,d,format=qcow2,if=none,id=drive-d0,backing.driver=raw"


def test_an_encrypted_backing_image_of_a_legacy_drive_gets_its_key() -> None:
    (secret, drive, _) = arguments(
        "images: [{size: 1M, secret: pw, options: {encrypt.format: luks}}, {}]\n"
        "attach: {style: drive}"
    )
    assert secret == ("-object", {"qom-type": "secret", "id": "secret-0", "data": "pw"})
    assert drive[1].endswith(",backing.encrypt.key-secret=secret-0")


def test_iothreads() -> None:
    assert [
        value.get("id")
        for option, value in arguments("images: [{size: 1M}]\nattach: {iothread: per-queue}")
        if option == "-object"
    ] == ["iothread-d0-0", "iothread-d0-1"]
    found = arguments("images: [{size: 1M}]\nattach: {device: virtio-scsi, iothread: one}")
    assert found[2][1]["iothread"] == "iothread-d0-0"
    assert found[3][1]["bus"] == "scsi-d0.0"
