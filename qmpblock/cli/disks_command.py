"""`qmpblock disks`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, emit, uncut
from qmpblock.cli.app import command as make_command
from qmpblock.errors import printable
from qmpblock.qemu.elsewhere import disks_served_elsewhere

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.text import Text

    from qmpblock.graph.model import Device
    from qmpblock.qemu.elsewhere import ServedDisk

__all__ = ["command", "document", "served_document"]


@make_command
@click.argument("address")
async def command(options: Options, address: str) -> None:
    """List the disks of the VM whose monitor is at ADDRESS.

    For each guest device: its layers from the active one down, with format and virtual
    size, the filters on top, the jobs that run on it, and its exports.
    """
    async with options.connect(address) as vm:
        graph = await vm.graph()
        devices = graph.devices
        called = {disk: name for name, disk in (await vm.disks_called(graph)).items()}
        served = await disks_served_elsewhere(vm.monitor)
    if options.json:
        documents = [document(one, called.get(one.name)) for one in devices]
        documents += [served_document(one) for one in served]
        emit(json.dumps(documents, indent=2) + "\n")
    else:
        _show(devices, called, served)


def document(device: Device, called: str | None = None) -> dict[str, Any]:
    """Return one record of docs/schema/disks.schema.json.

    :param called: what its manager calls it, where that is another name.
    """
    chain = device.chain
    return {
        "device": device.name,
        **({"called": called} if called else {}),
        "qom_path": device.qom_path,
        "root_node": chain.root.name if chain else None,
        "format_node": chain.active.node.name if chain else None,
        "size": chain.active.size if chain else None,
        "read_only": device.read_only,
        "layers": [
            {
                "depth": layer.depth,
                "node": layer.node.name,
                "file": layer.file,
                "format": layer.format,
                "size": layer.size,
            }
            for layer in (chain.layers if chain else ())
        ],
        "filters": [
            {"node": node.name, "driver": node.driver} for node in (chain.filters if chain else ())
        ],
        "jobs": [
            {
                "id": job.id,
                "type": job.type,
                "status": job.status,
                "current": job.current,
                "total": job.total,
            }
            for job in device.jobs
        ],
        "exports": list(device.exports),
    }


def served_document(disk: ServedDisk) -> dict[str, Any]:
    """Return the record of a disk that another process serves."""
    return {
        "device": disk.name,
        "qom_path": disk.qom_path,
        "root_node": None,
        "format_node": None,
        "size": None,
        "read_only": False,
        "layers": [],
        "filters": [],
        "jobs": [],
        "exports": [],
        "served_elsewhere": {"driver": disk.driver, "socket": disk.socket},
    }


def _show(
    devices: tuple[Device, ...], called: Mapping[str, str], served: tuple[ServedDisk, ...]
) -> None:
    from rich.text import Text
    from rich.tree import Tree

    if not devices and not served:
        emit("This VM has no disks.\n")
    for device in devices:
        tree = Tree(_title(device, called.get(device.name)), guide_style="dim")
        if device.chain is not None:
            for node in device.chain.filters:
                tree.add(_line(f"filter  {node.driver}", node.name))
            for layer in device.chain.layers:
                tree.add(
                    _line(
                        f"@{layer.depth:<4}  {layer.format}",
                        layer.node.name,
                        layer.file,
                        _size(layer.size),
                    )
                )
        for job in device.jobs:
            tree.add(_line(f"job     {job.type}", job.id, job.status))
        for export in device.exports:
            tree.add(_line("export", export))
        uncut(tree)
    for disk in served:
        line = Text()
        line.append(printable(disk.name), style="bold")
        line.append(f"  {printable(disk.driver)}: {disk.where()} has its images")
        uncut(line)


def _title(device: Device, called: str | None) -> Text:
    from rich.text import Text

    title = Text()
    title.append(printable(device.name), style="bold")
    if called:
        title.append(f" ({printable(called)})")
    if device.chain is None:
        title.append("  (empty)", style="dim")
    else:
        title.append(f"  {_size(device.chain.active.size)}")
        title.append("  read-only" if device.read_only else "  read-write", style="dim")
    if device.qom_path != device.name:
        title.append(f"  {printable(device.qom_path)}", style="dim")
    return title


def _line(kind: str, *rest: str) -> Text:
    from rich.text import Text

    text = Text(f"{kind:<14} ")
    text.append("  ".join(printable(part) for part in rest))
    return text


def _size(size: int) -> str:
    from qmpblock.sizes import human_size

    return human_size(size)
