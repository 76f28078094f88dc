"""`qmpblock jobs`."""

from __future__ import annotations

import json
from typing import Any

import click

from qmpblock.cli.app import Options, emit, uncut
from qmpblock.cli.app import command as make_command
from qmpblock.errors import printable
from qmpblock.graph.model import BlockGraph, JobInfo

__all__ = ["command", "document"]


@make_command
@click.argument("address")
async def command(options: Options, address: str) -> None:
    """List the background jobs of a VM, with the disk that each works on, and whose it is.

    Jobs of others are shown, and never touched.
    """
    async with options.connect(address) as vm:
        graph = await vm.graph()
    documents = [document(job, graph) for job in graph.jobs]
    if options.json:
        emit(json.dumps(documents, indent=2) + "\n")
    elif not documents:
        click.echo("This VM has no jobs.")
    else:
        _show(documents)


def document(job: JobInfo, graph: BlockGraph) -> dict[str, Any]:
    """Return one record of docs/schema/jobs.schema.json."""
    disks = [device.name for device in graph.devices if job in device.jobs]
    return {
        "id": job.id,
        "type": job.type,
        "status": job.status,
        "current": job.current,
        "total": job.total,
        "error": job.error,
        "ours": job.ours,
        "disks": disks,
        "nodes": sorted(job.nodes),
    }


def _show(documents: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from qmpblock.sizes import human_size

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "type", "status", "disk", "progress", "whose"):
        table.add_column(name)
    for one in documents:
        progress = f"{human_size(one['current'])} of {human_size(one['total'])}"
        if one["error"]:
            progress = f"failed: {printable(one['error'])}"
        words = (
            printable(one["id"]),
            printable(one["type"]),
            printable(one["status"]),
            printable(" ".join(one["disks"]) or "-"),
            progress,
            "ours" if one["ours"] else "foreign",
        )
        table.add_row(*(Text(word) for word in words))
    uncut(table)
