"""The devices of a VM as its guest finds them: by where they are, not by their names. Pure.

QEMU's `info qtree` shows every device and its properties in one answer, on every QEMU alike; by the
object tree that would be a command for each property. What it looks like::

    bus: pci.0                             a bus: its name, which may be of the device it belongs to
      type PCI
      dev: virtio-scsi-pci, id "scsi0"     a device on it
        addr = 05.0                        its properties
        vectors = 5 (0x5)
        bus: virtio-bus                    a bus of its own
          ...

A place is the way there from the top, `/System:i440FX-pcihost/PCI:05.0/virtio-pci-bus:0/...`. It
has no name in it that somebody chose, and so is the same at both ends of a migration exactly
where the guest finds the same thing at the same address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qmpblock.errors import GraphError, printable

__all__ = ["GuestDevice", "read_tree"]

_BUS = re.compile(r"bus: (.*)")
_DEVICE = re.compile(r'dev: ([^,]*), id "(.*)"')
_PROPERTY = re.compile(r"([\w.\[\]-]+) = (.*)")
_NUMBER = re.compile(r"(-?\d+) \(.*\)")
_LINKS = ("/machine/", "/objects/")  # to other objects, which are called otherwise elsewhere
_LONGEST = 4096  # characters of a line
_DEEPEST = 100  # buses and devices upon each other
_USB = re.compile(r"addr [\d.]+, port ([\d.]+),.*")


@dataclass(frozen=True)
class GuestDevice:
    """One device.

    :ivar place: where the guest finds it.
    :ivar type: QEMU's name of what it is.
    :ivar id: what it is called; empty where it is not.
    :ivar bus: the name of the bus that it is on.
    :ivar properties: as QEMU prints them, numbers in decimal, text without its quotes; no links.
    """

    place: str
    type: str
    id: str
    bus: str
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The place, for people."""
        parts = [
            part.replace(":", " ", 1)
            for part in self.place.split("/")[1:]
            if not part.startswith(("System:", "virtio-pci-bus:", "virtio-mmio-bus:"))
        ]
        return " of ".join(reversed(parts)) or self.place.rpartition(":")[2]

    def describe(self) -> str:
        """Say which device it is, for people."""
        named = f" {printable(self.id)}" if self.id else ""
        return f"{printable(self.type)}{named} at {printable(self.where)}"


@dataclass
class _Open:
    """A bus or a device that is being read."""

    indent: int
    bus: bool
    name: str
    place: str
    type: str = ""
    lines: list[str] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    inside: list[_Open] = field(default_factory=list)


def read_tree(text: str) -> tuple[GuestDevice, ...]:
    """Read what `info qtree` prints: the devices, each after that whose bus it is on.

    :raise GraphError: it makes no sense.
    """
    top = _Open(-1, False, "", "")
    stack = [top]
    for line in text.splitlines():
        if len(line) > _LONGEST:
            continue  # nothing that QEMU prints
        words = line.strip()
        indent = len(line) - len(line.lstrip())
        # Most lines are properties.
        bus = _BUS.fullmatch(words) if words.startswith("bus: ") else None
        device = _DEVICE.fullmatch(words) if words.startswith("dev: ") else None
        if bus or device:
            while stack[-1].indent >= indent:
                stack.pop()
            if bus:
                one = _Open(indent, True, bus[1], "")
            else:
                assert device is not None
                one = _Open(indent, False, device[2], "", device[1])
            if len(stack) > _DEEPEST:
                raise GraphError("QEMU's answer makes no sense: too many devices upon each other")
            stack[-1].inside.append(one)
            stack.append(one)
        elif stack[-1].bus and words.startswith("type ") and not stack[-1].type:
            stack[-1].type = words.removeprefix("type ")
        elif found := _PROPERTY.fullmatch(words):
            if not found[2].lstrip('"').startswith(_LINKS):
                stack[-1].properties[found[1]] = _value(found[2])
        else:
            stack[-1].lines.append(words)
    return tuple(_devices(top, ""))


def _devices(parent: _Open, place: str) -> Iterator[GuestDevice]:
    """Yield what is on the buses of a device."""
    of_type: dict[str, int] = {}
    for bus in parent.inside:
        number = of_type[bus.type] = of_type.get(bus.type, -1) + 1
        way = f"{place}/{bus.type}" + (f"#{number}" if number else "")
        taken: dict[str, int] = {}
        for device in reversed(bus.inside):  # the last that was made is printed first
            address = _address(bus.type, device)
            count = taken[address] = taken.get(address, -1) + 1
            here = f"{way}:{address}" + (f"#{count}" if count else "")
            if bus.type == "usb-bus":  # it is in the place, whether or not somebody chose it
                device.properties.pop("port", None)
            yield GuestDevice(here, device.type, device.name, bus.name, device.properties)
            yield from _devices(device, here)


def _address(bus: str, device: _Open) -> str:
    """Return where on its bus a device is; what it is where that has no addresses."""
    has = device.properties
    if "addr" in has:
        return has["addr"]
    if {"channel", "scsi-id", "lun"} <= set(has):
        return f"{has['channel']}:{has['scsi-id']}:{has['lun']}"
    if bus == "IDE" and "unit" in has:
        return has["unit"]
    for line in device.lines:
        if found := _USB.fullmatch(line):
            return found[1]
    if bus.startswith("virtio-") and bus.endswith("-bus"):
        return "nr " + has["nr"] if "nr" in has else "0"
    return device.type


def _value(text: str) -> str:
    if number := _NUMBER.fullmatch(text):
        return number[1]
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
