"""What libvirt says of a domain, and is told to do, in its XML. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["copy_xml", "disk_chain", "disk_files", "disk_targets", "is_ready", "snapshot_xml"]


def disk_targets(xml: str) -> dict[str, str]:
    """Return the ids in QEMU of a domain's disks, by libvirt's names of them (`vda`).

    :raise ValueError: it is no XML.
    """
    return {
        name: alias.get("name", "")
        for name, disk in _disks(xml)
        if (alias := disk.find("alias")) is not None
    }


def disk_files(xml: str) -> dict[str, str]:
    """Return the image file of each disk, by libvirt's names; empty where it has none.

    :raise ValueError: it is no XML.
    """
    return {
        name: "" if (source := disk.find("source")) is None else source.get("file", "")
        for name, disk in _disks(xml)
    }


def disk_chain(xml: str, name: str) -> list[tuple[str, str]]:
    """Return the file of each layer of a running domain's disk, and the index that it goes by.

    The active layer comes first; `vda[3]` names the layer whose index is 3.

    :raise ValueError: it is no XML.
    """
    layers, at = [], dict(_disks(xml)).get(name)
    while at is not None and (source := at.find("source")) is not None:
        index = source.get("index") or at.get("index")  # the active layer has it in its source
        layers.append((source.get("file", ""), index or ""))
        at = at.find("backingStore")
    return layers


def is_ready(xml: str, name: str) -> bool:
    """Whether a job of libvirt's on a running domain's disk waits to pivot.

    :raise ValueError: it is no XML.
    """
    disk = dict(_disks(xml)).get(name)
    mirror = None if disk is None else disk.find("mirror")
    return mirror is not None and mirror.get("ready") == "yes"


def copy_xml(image: str, fmt: str) -> str:
    """Describe the image into which a disk is to be copied.

    :param image: its file; `fmt`: its format.
    """
    disk = ElementTree.Element("disk", type="file")
    ElementTree.SubElement(disk, "driver", name="qemu", type=fmt)
    ElementTree.SubElement(disk, "source", file=image)
    return ElementTree.tostring(disk, encoding="unicode")


def snapshot_xml(overlays: Mapping[str, str], others: Iterable[str]) -> str:
    """Describe a snapshot of some disks, and of no other.

    :param overlays: qcow2 files by libvirt's names of the disks; `others`: those that stay.
    """
    root = ElementTree.Element("domainsnapshot")
    disks = ElementTree.SubElement(root, "disks")
    for name, file in overlays.items():
        disk = ElementTree.SubElement(disks, "disk", name=name, snapshot="external", type="file")
        ElementTree.SubElement(disk, "driver", type="qcow2")
        ElementTree.SubElement(disk, "source", file=file)
    for name in sorted(others):
        ElementTree.SubElement(disks, "disk", name=name, snapshot="no")
    return ElementTree.tostring(root, encoding="unicode")


def _disks(xml: str) -> Iterator[tuple[str, ElementTree.Element]]:
    try:
        # The daemon's own, as trusted as its answers; expat refuses to blow up.
        root = ElementTree.fromstring(xml)  # noqa: S314
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
    for disk in root.iterfind("./devices/disk"):
        target = disk.find("target")
        if target is not None:
            yield target.get("dev", ""), disk
