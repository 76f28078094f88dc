"""The QEMU options that attach disks as their scenario says. Pure: text in, text out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qmpblock.testing.images import BuiltDisk
from qmpblock.testing.scenario import Attachment

__all__ = ["disk_arguments", "served_arguments"]

_THROTTLE = 256 << 20  # bytes a second: present, but no brake on the tests


def disk_arguments(
    disks: Sequence[BuiltDisk], machine: str = "pc", *, empty_tray: bool = False
) -> list[str]:
    """Return the options for `disks`, in their order, and for an empty CD-ROM drive.

    Nodes of a disk `d0` (where it names its nodes) are `d0` and `d0-file` for the active
    layer, `d0-1`, `d0-1-file` for its backing image and so on, `d0-data` for a data file,
    `d0-throttle` and `d0-copy-on-read` for filters.
    """
    arguments: list[str] = []
    if any(disk.spec.attach.device == "usb-storage" for disk in disks):
        arguments += _device({"driver": "qemu-xhci", "id": "xhci0"})
    for disk in disks:
        for name, data in disk.active.secrets().items():
            arguments += _object({"qom-type": "secret", "id": name, "data": data})
    ide = 0  # devices on IDE buses so far
    for disk in disks:
        arguments += _objects(disk)
        if disk.spec.attach.style == "blockdev":
            arguments += _blockdev(disk)
            arguments += _devices(disk.spec.name, disk.spec.attach, machine, ide)
        else:
            arguments += ["-drive", _drive(disk)]
            if disk.spec.attach.style == "drive":
                arguments += _devices(disk.spec.name, disk.spec.attach, machine, ide)
        ide += disk.spec.attach.device == "ide"
    if empty_tray:
        arguments += _device({"driver": "ide-cd", "id": "tray0", **_ide_bus(machine, ide)})
    return arguments


def _root(name: str, attach: Attachment) -> str:
    """Return the node or drive that the guest device is given."""
    if attach.style != "blockdev":
        return f"drive-{name}"
    return f"{name}-{attach.filters[0]}" if attach.filters else name


def _object(properties: dict[str, Any]) -> list[str]:
    return ["-object", json.dumps(properties)]


def _device(properties: dict[str, Any]) -> list[str]:
    return ["-device", json.dumps(properties)]


def _iothreads(name: str, attach: Attachment) -> list[str]:
    count = {"none": 0, "one": 1, "per-queue": 2}[attach.iothread]
    return [f"iothread-{name}-{index}" for index in range(count)]


def _objects(disk: BuiltDisk) -> list[str]:
    name, attach = disk.spec.name, disk.spec.attach
    arguments: list[str] = []
    for iothread in _iothreads(name, attach):
        arguments += _object({"qom-type": "iothread", "id": iothread})
    if "throttle" in attach.filters and attach.style == "blockdev":
        group = {"qom-type": "throttle-group", "id": f"group-{name}"}
        arguments += _object({**group, "limits": {"bps-total": _THROTTLE}})
    return arguments + _slow_groups(disk)


def _slow_groups(disk: BuiltDisk) -> list[str]:
    arguments: list[str] = []
    for layer in disk.active.chain():
        if layer.slow is not None:
            group = {"qom-type": "throttle-group", "id": layer.slow_group()}
            arguments += _object({**group, "limits": {"bps-total": layer.slow}})
    return arguments


def served_arguments(disk: BuiltDisk, *, writable: bool) -> list[str]:
    """Return the options of a storage daemon that opens a disk's images, under the disk's name."""
    arguments = _slow_groups(disk)
    for ident, data in disk.active.secrets().items():
        arguments += _object({"qom-type": "secret", "id": ident, "data": data})
    described = disk.active.describe(node=disk.spec.name, live=True)
    if not writable:
        described["read-only"] = True
    arguments += [*_layers_apart(described), "-blockdev", json.dumps(described)]
    return [f"-{one}" if one in ("-object", "-blockdev") else one for one in arguments]


def _blockdev(disk: BuiltDisk) -> list[str]:
    name, attach = disk.spec.name, disk.spec.attach
    described = disk.active.describe(
        node=name if attach.node_names else None,
        discard=attach.discard,
        detect_zeroes=attach.detect_zeroes,
        live=True,
    )
    separate: list[str] = []
    if any(layer.faults or layer.slow is not None for layer in disk.active.chain()):
        separate = _layers_apart(described)
    for kind in reversed(attach.filters):
        group = {"throttle-group": f"group-{name}"} if kind == "throttle" else {}
        own = {"node-name": f"{name}-{kind}"} if attach.node_names else {}
        # A filter must pass discards on, or the guest's own are lost.
        unmap = {"discard": "unmap"} if attach.discard == "unmap" else {}
        described = {"driver": kind, **own, **group, **unmap, "file": described}
    described["node-name"] = _root(name, attach)  # the device must be given something
    return [*separate, "-blockdev", json.dumps(described)]


def _layers_apart(described: dict[str, Any]) -> list[str]:
    """Take the backing layers out of a description, each for a `-blockdev` of its own.

    QEMU does not see that a backing image described in place has a file unless that file has
    a `filename` itself, and adds the recorded name: then it refuses a blkdebug or throttle
    node in that place ("Can't specify 'file' and 'filename'").
    """
    nodes = []
    layer = described
    while "backing" in layer:
        below = layer["backing"]
        layer["backing"] = below["node-name"]
        # What QEMU gives a backing image that is described in place.
        below["read-only"] = below["auto-read-only"] = True
        nodes.append(below)
        layer = below
    return [part for below in reversed(nodes) for part in ("-blockdev", json.dumps(below))]


def _drive(disk: BuiltDisk) -> str:
    """Return the value of a legacy `-drive`: the chain is what the headers say."""
    name, attach, active = disk.spec.name, disk.spec.attach, disk.active
    interface = "none"
    if attach.style == "drive-if":
        interface = {"virtio-blk": "virtio", "ide": "ide"}[attach.device]
    options = {"file": str(active.path), "format": active.spec.format, "if": interface}
    if attach.style == "drive":
        options["id"] = _root(name, attach)
    elif attach.id is not None:
        options["id"] = attach.id
    if attach.discard != "ignore":
        options["discard"] = attach.discard
    if attach.detect_zeroes != "off":
        options["detect-zeroes"] = attach.detect_zeroes
    if "throttle" in attach.filters:
        options["throttling.bps-total"] = str(_THROTTLE)
    if "copy-on-read" in attach.filters:
        options["copy-on-read"] = "on"
    for depth, layer in enumerate(active.chain()):
        below = "backing." * depth
        if layer.secret is not None:
            key = "key-secret" if layer.spec.format == "luks" else "encrypt.key-secret"
            options[below + key] = layer.secret[0]
        if layer.backing is not None and not layer.spec.backing_format:
            options[f"{below}backing.driver"] = layer.backing.spec.format  # else it is probed
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _ide_bus(machine: str, number: int) -> dict[str, Any]:
    """Return the place of an IDE device: q35 has one on each bus, pc two (QEMU finds them)."""
    return {"bus": f"ide.{number}"} if machine == "q35" else {}


def _devices(name: str, attach: Attachment, machine: str, ide: int) -> list[str]:
    """Return the guest device of a disk, and its controller where it needs one of its own.

    :param ide: how many IDE devices there are before it.
    """
    iothreads = _iothreads(name, attach)
    device: dict[str, Any] = {"drive": _root(name, attach)}
    if attach.id is not None:
        device["id"] = attach.id
    transport = "device" if machine == "microvm" else "pci"
    if attach.device == "virtio-blk":
        device = {"driver": f"virtio-blk-{transport}", **device}
        if attach.iothread == "per-queue":
            device["num-queues"] = len(iothreads)
            device["iothread-vq-mapping"] = [{"iothread": thread} for thread in iothreads]
        elif iothreads:
            device["iothread"] = iothreads[0]
        return _device(device)
    if attach.device == "virtio-scsi":
        controller: dict[str, Any] = {"driver": f"virtio-scsi-{transport}", "id": f"scsi-{name}"}
        if iothreads:
            controller["iothread"] = iothreads[0]
        return _device(controller) + _device(
            {"driver": "scsi-hd", "bus": f"scsi-{name}.0", **device}
        )
    drivers = {"ide": "ide-hd", "nvme": "nvme", "usb-storage": "usb-storage"}
    device = {"driver": drivers[attach.device], **device}
    if attach.device == "ide":
        device |= _ide_bus(machine, ide)
    if attach.device == "nvme":
        device["serial"] = name
    if attach.device == "usb-storage":
        device["bus"] = "xhci0.0"
    return _device(device)
