"""`qmpblock vms`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpblock.graph.model import Device
    from qmpblock.inventory.listing import RunningVM

__all__ = ["command", "document"]


@make_command
async def command(options: Options) -> None:
    """List the VMs of this host, whoever runs them, and how each can be worked on.

    They are found by their processes, and asked by their monitors, with queries alone. For each:
    who manages it, the ADDRESS to give, its disks, and what is refused there, with the manager's
    own way to it. Where there is no address, or a monitor does not answer, why, and what to do.
    """
    from qmpblock.inventory.listing import vms

    found = await vms()
    if options.json:
        emit(json.dumps([document(vm) for vm in found], indent=2) + "\n")
    elif not found:
        click.echo("No VM runs on this host, as far as this user may see.")
    else:
        _show(found)


def document(vm: RunningVM) -> dict[str, Any]:
    """Return one record of docs/schema/vms.schema.json."""
    manager = None
    if vm.manager is not None:
        manager = {"name": vm.manager.name, "vm": vm.manager.vm, "told_by": vm.manager.told_by}
    return {
        "name": vm.name,
        "pid": vm.pid,
        "user": vm.user,
        "manager": manager,
        "address": vm.address,
        "trouble": vm.trouble,
        "remedy": vm.remedy,
        "status": vm.status,
        "disks": None if vm.devices is None else [_disk(vm, device) for device in vm.devices],
        "refused": dict(vm.refused),
    }


def _disk(vm: RunningVM, device: Device) -> dict[str, Any]:
    active = device.chain.active if device.chain else None
    called = vm.called.get(device.name)
    return {
        "device": device.name,
        **({"called": called} if called else {}),
        "read_only": device.read_only,
        "size": active.size if active else None,
        "format": active.format if active else None,
        "file": active.file if active else None,
        "layers": len(device.chain.layers) if device.chain else 0,
    }


def _show(found: Sequence[RunningVM]) -> None:
    for vm in found:
        who = vm.manager.name if vm.manager is not None else "no manager"
        words = (vm.name or "(no name)", f"process {vm.pid} of {vm.user}", who, vm.status or "")
        emit("  ".join(printable(word) for word in words if word) + "\n")
        emit(f"  address  {printable(vm.address) if vm.address else 'none'}\n")
        if vm.trouble:
            emit(f"  trouble  {printable(vm.trouble, 1000)}\n")
        if vm.remedy:
            emit(f"  remedy   {printable(vm.remedy, 1000)}\n")
        for device in vm.devices or ():
            emit(f"  disk     {_line(_disk(vm, device))}\n")
        if vm.refused:
            emit(f"  refused  {', '.join(vm.refused)}\n")


def _line(disk: dict[str, Any]) -> str:
    from qmpblock.sizes import human_size

    name = printable(disk["device"])
    if called := disk.get("called"):
        name += f" ({printable(called)})"
    if disk["size"] is None:
        return f"{name}  (empty)"
    words = [name, human_size(disk["size"]), printable(disk["format"])]
    words.append(printable(disk["file"]))
    if disk["layers"] > 1:
        words.append(f"{disk['layers']} layers")
    if disk["read_only"]:
        words.append("read-only")
    return "  ".join(words)
