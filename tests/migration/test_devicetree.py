"""Places of devices, as `info qtree` shows them."""

from __future__ import annotations

import pytest

from qmpblock.errors import GraphError
from qmpblock.migration.devicetree import read_tree

TREE = """\
bus: main-system-bus
  type System
  dev: i440FX-pcihost, id ""
    gpio-in "" 2
    bus: pci.0
      type PCI
      dev: piix3-usb-uhci, id "usb0"
        addr = 01.2
        bus: usb0.0
          type usb-bus
          dev: usb-tablet, id ""
            usb_version = 2 (0x2)
            port = ""
            addr 0.0, port 1.3, speed 480, name QEMU USB Tablet, attached
      dev: piix3-ide, id ""
        addr = 01.1
        bus: ide.1
          type IDE
          dev: ide-cd, id "cd0"
            unit = 0 (0x0)
            model = ""
        bus: ide.0
          type IDE
          dev: ide-hd, id ""
            unit = 1 (0x1)
            drive = "hda"
            pit = "/machine/unattached/device[8]"
      dev: virtio-serial-pci, id "vs0"
        addr = 03.0
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-serial-device, id ""
            max_ports = 31 (0x1f)
            bus: vs0.0
              type virtio-serial-bus
              dev: virtserialport, id ""
                nr = 2 (0x2)
                name = "a, \\"b\\""
"""


def test_every_bus_has_its_own_addresses():
    places = {one.place: one for one in read_tree(TREE)}
    top = "/System:i440FX-pcihost"
    assert set(places) == {
        top,
        f"{top}/PCI:01.1",
        f"{top}/PCI:01.1/IDE:0",
        f"{top}/PCI:01.1/IDE#1:1",
        f"{top}/PCI:01.2",
        f"{top}/PCI:01.2/usb-bus:1.3",
        f"{top}/PCI:03.0",
        f"{top}/PCI:03.0/virtio-pci-bus:0",
        f"{top}/PCI:03.0/virtio-pci-bus:0/virtio-serial-bus:nr 2",
    }
    port = places[f"{top}/PCI:03.0/virtio-pci-bus:0/virtio-serial-bus:nr 2"]
    assert port.properties["name"] == 'a, \\"b\\"'
    assert port.where == "virtio-serial-bus nr 2 of PCI 03.0"
    assert port.bus == "vs0.0"


def test_what_differs_between_two_qemus_of_one_machine_is_left_out():
    """Links to other objects, and a port that is in the place, chosen or not."""
    [disk] = [one for one in read_tree(TREE) if one.type == "ide-hd"]
    [tablet] = [one for one in read_tree(TREE) if one.type == "usb-tablet"]
    assert disk.properties == {"unit": "1", "drive": "hda"}
    assert tablet.properties == {"usb_version": "2"}


def test_what_no_qemu_prints():
    assert read_tree("") == ()
    assert read_tree("dev: x\n  a = \nbus:\n\x00") == ()
    long = f'bus: b\n  type T\n  dev: d, id ""\n    a = {"x" * 5000}\n    b = 1 (0x1)\n'
    assert read_tree(long)[0].properties == {"b": "1"}
    deep = "".join(f'{" " * n}dev: d, id ""\n' for n in range(3000))
    with pytest.raises(GraphError, match="upon each other"):
        read_tree(deep)
