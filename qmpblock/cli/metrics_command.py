"""`qmpblock metrics`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import WARNED, Options, emit, warn
from qmpblock.cli.app import command as make_command
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.metrics.figures import VMFigures

__all__ = ["command"]


@make_command
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@click.option(
    "--textfile",
    metavar="FILE",
    help="Write them to FILE instead, for the node exporter's textfile collector: whole, or not.",
)
@click.option(
    "--no-map",
    is_flag=True,
    help="Take no maps: nothing is added to any VM, and what each layer holds is not told.",
)
async def command(
    options: Options, addresses: tuple[str, ...], textfile: str | None, no_map: bool
) -> int:
    """Print figures of running VMs and their disks in Prometheus's text format.

    All VMs are looked at at once, each for no longer than --stall. One that does not answer is
    told of by qmpblock_up, and by exit code 4.
    """
    from qmpblock.metrics.figures import gather
    from qmpblock.metrics.text import figures_of, rendered
    from qmpblock.metrics.textfile import check, replace

    if textfile is not None:
        check(textfile)
    if textfile is not None or not options.json:
        rendered(())  # without the library nothing is asked of anybody
    seen = await gather(addresses, options.connect, limit=options.stall, maps=not no_map)
    if textfile is not None or not options.json:
        text = rendered(figure for vm in seen for figure in figures_of(vm))
        if textfile is not None:
            replace(textfile, text)
        else:
            emit(text)
    if options.json:
        emit(json.dumps({"vms": [_document(vm) for vm in seen]}, indent=2) + "\n")
    silent = [vm for vm in seen if vm.error is not None]
    warn(tuple(f"{printable(vm.address)}: {vm.error}" for vm in silent))
    return WARNED if silent else 0


def _document(vm: VMFigures) -> dict[str, Any]:
    """Return the entry of docs/schema/metrics.schema.json."""
    document = asdict(vm)
    document["jobs"] = [
        {"id": job.id, "type": job.type, "done": job.current, "total": job.total} for job in vm.jobs
    ]
    return document
