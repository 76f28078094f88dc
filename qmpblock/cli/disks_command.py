"""`qmpblock disks`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.errors import printable

if TYPE_CHECKING:
    from rich.text import Text

    from qmpblock.graph import Device

__all__ = ["command", "document"]


@make_command
@click.argument("address")
async def command(options: Options, address: str) -> None:
    """List the disks of the VM whose monitor is at ADDRESS.

    For each guest device: its layers from the active one down, with format and virtual
    size, the filters on top, the jobs that run on it, and its exports.
    """
    async with options.connect(address) as vm:
        devices = (await vm.graph()).devices
    if options.json:
        emit(json.dumps([document(device) for device in devices], indent=2) + "\n")
    else:
        _show(devices)


def document(device: Device) -> dict[str, Any]:
    """Return one record of docs/schema/disks.schema.json."""
    chain = device.chain
    return {
        "device": device.name,
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


def _show(devices: tuple[Device, ...]) -> None:
    from rich.console import Console
    from rich.tree import Tree

    console = Console(highlight=False, soft_wrap=True)
    if not devices:
        console.print("This VM has no disks.")
    for device in devices:
        tree = Tree(_title(device), guide_style="dim")
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
        console.print(tree)


def _title(device: Device) -> Text:
    from rich.text import Text

    title = Text()
    title.append(printable(device.name), style="bold")
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
    from qmpblock.render import human_size

    return human_size(size)
