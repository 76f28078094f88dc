"""The command line of a destination: the same machine, waiting. Pure.

What the monitor shows is what is there now: devices that were plugged in later, images that have
changed. So devices, disks and iothreads are written anew from that, each device at the very place
where the guest finds it, with the properties in which it is not as it would be by itself; the rest
is taken from what the source was started with. Whether it has become the same is seen when it runs:
`qmpblock migrate --dry-run` holds it against the source.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qmpblock.errors import UNTOUCHED, GraphError, UnsupportedError, printable
from qmpblock.graph.jsonname import said_by
from qmpblock.graph.model import DiskDevice, Layer
from qmpblock.graph.openings import in_part
from qmpblock.graph.options import cache_options, key_secret, options_of
from qmpblock.migration.devicetree import GuestDevice
from qmpblock.migration.diskterms import Layers
from qmpblock.migration.machine import GuestDisk, Machine
from qmpblock.migration.options import has_key, objects_of, program, sort_out
from qmpblock.migration.properties import names

__all__ = ["Image", "Launch", "Origin", "Property", "launch"]


@dataclass(frozen=True)
class Property:
    """A property of a sort of device: its type, and what it is by default, as QEMU says it."""

    type: str
    default: Any


@dataclass(frozen=True)
class Origin:
    """What the destination's command line is made of.

    :ivar words: that the source was started with; none where that cannot be seen.
    :ivar plugged: ids of the devices that have one; `unnamed`: types of those that were added
        without.
    :ivar defaults: the properties of each sort of device.
    :ivar objects: options of objects, as the monitor tells them.
    :ivar others: ids of the objects of which it does not, with their types.
    :ivar iothreads: by devices' ids, the options that give each its iothreads.
    :ivar disks: of the source.
    :ivar kvm: whether it runs by KVM; `name`: of the VM; `firmware`: the file of its BIOS.
    """

    machine: Machine
    words: tuple[str, ...] = ()
    plugged: frozenset[str] = frozenset()
    unnamed: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, Property]] = field(default_factory=dict)
    objects: tuple[Mapping[str, Any], ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    iothreads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    disks: tuple[DiskDevice, ...] = ()
    kvm: bool = False
    name: str = ""
    firmware: str = ""


@dataclass(frozen=True)
class Image:
    """An image that the destination is to have, of the disk's own size in bytes.

    :ivar secret: the id of the secret object that encrypts it.
    :ivar backing: the file that it lies on, of the format `backing_format`; None: on none.
    :ivar preallocated: whether every byte of it has host space from the start.
    """

    file: str
    format: str
    size: int
    secret: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    preallocated: bool = False


@dataclass(frozen=True)
class Launch:
    """A destination that could be started.

    :ivar words: of its command line.
    :ivar monitor: the socket of its QMP monitor.
    :ivar images: that have to be made before.
    :ivar missing: what only a person can add, in words: it cannot be started without.
    :ivar notes: what is to be looked at.
    """

    words: tuple[str, ...]
    monitor: str
    images: tuple[Image, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


#: Properties that QEMU finds by itself: from the image, the ROM, the machine.
_FOUND = names(
    "busnr class cyls discard_granularity drive failover_pair_id heads iothread iothread-vq-mapping"
    " lcyls lheads lsecs"
    " migrate-extra modern-pio-notify rombar romfile romsize secs sriov-pf stats-intervals"
    " virtio-pci-bus-master-bug-migration"
)
_NO_BUS = "main-system-bus"
#: What hands its disk to a device inside, which finds its properties by itself.
_HOLDERS = ("usb-storage",)
_OTHER_DRIVES = ("floppy", "sd-card")
_STEM = re.compile(r"[^\w.-]")


def launch(
    origin: Origin,
    *,
    directory: str,
    sockets: str,
    qemu: str | None = None,
    format: str | None = None,  # noqa: A002 - the word of `copy`, and of the command
    layers: Layers = "all",
    preallocated: bool = False,
) -> Launch:
    """Return a destination's command line.

    :param directory: of its images; `sockets`: of its sockets.
    :param qemu: its program; None: the source's.
    :param format: of its images: qcow2 or raw; None: each disk's own, where that can be made. What
        is encrypted keeps its own.
    :param layers: what is to be copied to them: where it is the active layer alone (`top`), the
        image of a chain is qcow2, and lies on the disk's own backing image.
    :param preallocated: whether its images have host space for every byte from the start.
    :raise UnsupportedError: a disk is of a kind that cannot be written anew.
    """
    started, words = program(origin.words)
    kept = sort_out(words, sockets)
    monitor = posixpath.join(sockets, "qmp")
    line = [qemu] if qemu else list(started) or ["qemu-system-x86_64"]
    line += kept.words if words else _without_words(origin)
    line += _machine(origin, line)
    given, missing = _objects(origin, objects_of(words), sockets)
    line += given
    missing += kept.missing
    notes = list(kept.notes)
    if not words:
        notes.append(
            "how the source was started cannot be seen from here: network, displays and character "
            "devices are none, and -cpu may have had options"
        )
    images = []
    nodes: dict[str, str] = {}
    for disk, device in _disks(origin):
        on = device.chain.layers[1] if layers == "top" and len(device.chain.layers) > 1 else None
        node, image = _blockdev(disk, device, directory, origin, notes, format, on)
        nodes[disk.place] = node["node-name"]
        images += [replace(image, preallocated=preallocated)] if image is not None else []
        line += ["-blockdev", json.dumps(node)]
    for one in _devices(origin, nodes):
        line += ["-device", json.dumps(one)]
    line += ["-qmp", f"unix:{monitor.replace(',', ',,')},server=on,wait=off"]
    line += ["-S", "-incoming", "defer"]
    return Launch(tuple(line), monitor, tuple(images), tuple(missing), tuple(notes))


def _without_words(origin: Origin) -> list[str]:
    """Return the options of a VM of which only the monitor tells."""
    machine = origin.machine
    line = ["-nodefaults", "-no-user-config", "-display", "none"]
    line += ["-accel", "kvm" if origin.kvm else "tcg", "-m", f"{machine.memory}B"]
    smp = {key[4:]: value for key, value in machine.options.items() if key.startswith("smp.")}
    known = [f"{key}={smp[key]}" for key in ("cpus", "maxcpus", "sockets", "cores", "threads")]
    line += ["-smp", ",".join(known), "-cpu", machine.cpu]
    if machine.uuid.strip("0-"):
        line += ["-uuid", machine.uuid]
    if origin.name:
        line += ["-name", origin.name.replace(",", ",,")]
    if origin.firmware:
        line += ["-bios", origin.firmware]
    types = {one.type for one in machine.devices if one.id not in origin.plugged}
    for kind, word in {"VGA": "std", "cirrus-vga": "cirrus", "qxl-vga": "qxl"}.items():
        if kind in types - set(origin.unnamed):
            line += ["-vga", word]
    serial = sum(one.type == "isa-serial" for one in machine.devices)
    return line + ["-serial", "null"] * (serial - origin.unnamed.count("isa-serial"))


def _machine(origin: Origin, line: list[str]) -> list[str]:
    """Return what says which machine it is: an alias means another one to another QEMU."""
    given = {"-machine", "-M"} & set(line)
    options = "" if given else f",usb={origin.machine.options.get('usb', 'off')}"
    return ["-machine", f"{origin.machine.type}{options}"]


def _objects(origin: Origin, given: Mapping[str, str], sockets: str) -> tuple[list[str], list[str]]:
    """Return the options of objects, and what a person has to add. No key is in them."""
    line: list[str] = []
    missing: list[str] = []
    for one in origin.objects:
        line += ["-object", json.dumps(dict(one))]
    for name, kind in origin.others.items():
        word = given.get(name)
        if kind == "secret" and (word is None or has_key(word)):
            file = posixpath.join(sockets, f"{_STEM.sub('_', name)}.key")
            line += ["-object", json.dumps({"qom-type": "secret", "id": name, "file": file})]
            missing.append(f"the key {printable(name)}, in {printable(file)}: keys are never shown")
        elif word is not None and not has_key(word):
            line += ["-object", word]
        elif kind != "memory-backend-ram":  # the machine's own
            missing.append(f"the object {printable(name)} ({printable(kind)}), added later")
    return line, missing


def _disks(origin: Origin) -> Iterator[tuple[GuestDisk, DiskDevice]]:
    devices = {device.name: device for device in origin.disks}
    for disk in origin.machine.disks:
        if disk.size is None:
            continue
        if disk.name not in devices:
            raise GraphError(f"the disk {printable(disk.name)} has gone meanwhile")
        if not disk.place:
            raise UnsupportedError(
                f"where the guest finds the disk {printable(disk.name)} cannot be told",
                standing=UNTOUCHED,
                remedy="give its device an id when the VM is started, or write the command line",
            )
        yield disk, devices[disk.name]


def _blockdev(
    disk: GuestDisk,
    device: DiskDevice,
    directory: str,
    origin: Origin,
    notes: list[str],
    wanted: str | None,
    on: Layer | None,
) -> tuple[dict[str, Any], Image | None]:
    """Return the node of a disk, and the image to be made: none of a disk that is for reading.

    :param on: what the image is to lie on, which its header says; None: on none.
    """
    active = device.chain.active
    stem = _STEM.sub("_", device.id or device.drive or f"disk-{len(notes)}-{active.node.name}")
    name = active.node.name if not active.node.name.startswith("#") else f"{stem}-image"
    if disk.read_only:
        notes.append(f"{printable(disk.name)} is for reading: its image has to be there")
        fmt, file, image = active.format, active.file, None
    else:
        fmt = active.format if active.format in ("raw", "luks") and on is None else "qcow2"
        if wanted is not None and not active.node.encrypted:
            fmt = wanted
        elif wanted not in (None, fmt):
            notes.append(f"{printable(disk.name)} is encrypted: its image stays {fmt}")
        file = posixpath.join(directory, f"{stem}.{fmt}")
        secret = key_secret(active) if active.node.encrypted else None
        image = Image(file, fmt, disk.size or 0, secret)
        if on is not None:
            image = _over(image, on)
    file_node: dict[str, Any] = {"driver": "file", "filename": file, "discard": "unmap"}
    node: dict[str, Any] = {"driver": fmt, "node-name": name, "discard": "unmap", "file": file_node}
    if disk.read_only:
        node["read-only"] = file_node["read-only"] = True
    if active.node.detect_zeroes != "off":
        node["detect-zeroes"] = active.node.detect_zeroes
    cache = cache_options(active.node)
    if any(cache.values()):
        node["cache"] = file_node["cache"] = cache
    if image is not None and image.secret is not None:
        node |= (
            {"key-secret": image.secret}
            if fmt == "luks"
            else {"encrypt": {"format": "luks", "key-secret": image.secret}}
        )
    for number, above in enumerate(reversed(device.chain.filters)):
        options = options_of(origin.words, above)
        group = options.get("throttle-group") or said_by(above.filename).get("throttle-group")
        if above.driver != "throttle" or not group:
            notes.append(f"the filter {printable(above.name)} ({above.driver}) is left out")
            continue
        named = above.name if not above.name.startswith("#") else f"{stem}-throttle-{number}"
        kind = {"driver": "throttle", "node-name": named, "throttle-group": group}
        node = {**kind, "discard": "unmap", "file": node}
    return node, image


def _over(image: Image, on: Layer) -> Image:
    """Return the image over what it is to lie on.

    :raise UnsupportedError: no header can say it.
    """
    why = ""
    if image.format != "qcow2":
        why = f"a {image.format} image lies on none"
    elif not on.file.startswith("/") or in_part(on):
        why = f"{printable(on.file)} is no absolute name of a whole file"
    if why:
        raise UnsupportedError(
            f"{printable(image.file)} cannot lie on {on.describe()}: {why}",
            standing=UNTOUCHED,
            remedy="copy all layers; or write the command line, and make the image, by hand",
        )
    return replace(image, backing=on.file, backing_format=on.format)


def _devices(origin: Origin, nodes: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the devices that somebody added, each after that whose bus it is on."""
    unnamed = list(origin.unnamed)
    tree = origin.machine.devices
    built_in = {_inside(one) for one in tree}
    threads = {disk.place: disk.iothread for disk in origin.machine.disks if disk.iothread}
    for device in tree:
        inner = [one for one in tree if one.place == _inside(device)]
        drive = any("drive" in one.properties for one in (device, *inner))
        if device.id in origin.plugged:
            pass
        elif device.type in unnamed and not device.id:
            unnamed.remove(device.type)
        elif not drive or device.place in built_in or device.type in _OTHER_DRIVES:
            continue
        known = origin.defaults.get(device.type, {})
        options: dict[str, Any] = {"driver": device.type}
        if device.id:
            options["id"] = device.id
        if device.bus != _NO_BUS:
            options["bus"] = device.bus
        if "usb" in device.place.rpartition("/")[2]:
            options["port"] = device.place.rpartition(":")[2]
        for one in (device,) if device.type in _HOLDERS else (device, *inner):
            for name, text in one.properties.items():
                if name in known and (value := _changed(name, text, known[name])) is not None:
                    options[name] = value
        for one in (device, *inner):
            if one.place in nodes:
                options["drive"] = nodes[one.place]
        options |= origin.iothreads.get(device.id, {})
        if not device.id and "iothread" in known and (thread := _thread_below(device, threads)):
            options["iothread"] = thread
        yield options


def _inside(device: GuestDevice) -> str:
    """Return where the device would be that this one is built of, besides itself."""
    behind = "SCSI:0:0:0" if device.type in _HOLDERS else "virtio-pci-bus:0"
    return f"{device.place}/{behind}"


def _thread_below(device: GuestDevice, threads: Mapping[str, str]) -> str | None:
    return next(
        (
            thread
            for place, thread in threads.items()
            if place == device.place or place.startswith(f"{device.place}/")
        ),
        None,
    )


def _changed(name: str, text: str, known: Property) -> Any:
    """Return the value of a property that is not as it would be by itself; else None."""
    default = "" if known.default is None else str(known.default).lower()
    if name.startswith("x-") or name in _FOUND or text in ("", "<null>") or text == default:
        return None
    if known.type == "bool":
        return text == "true"
    if known.type.startswith(("int", "uint", "size")) and re.fullmatch(r"-?\d+", text):
        return int(text)
    return text
