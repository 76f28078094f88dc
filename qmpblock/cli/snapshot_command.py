"""`qmpblock snapshot`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Literal

import click

from qmpblock.cli.app import WARNED, Options, emit, pair, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.toolate import saying_where
from qmpblock.errors import printable

__all__ = ["command"]


@make_command
@click.argument("address")
@click.argument("overlays", nargs=-1, required=True, metavar="DISK=OVERLAY...")
@click.option("--format", "fmt", default="qcow2", show_default=True, metavar="FMT")
@click.option(
    "--backing-name",
    type=click.Choice(["relative", "absolute"]),
    default="relative",
    show_default=True,
    help="How an overlay records the image below it.",
)
@unmanaged_option
async def command(
    options: Options,
    address: str,
    overlays: tuple[str, ...],
    fmt: str,
    backing_name: Literal["relative", "absolute"],
    unmanaged: bool,
) -> int:
    """Freeze the active layer of disks of a running VM, all at one point in time.

    Each disk's writes go to its OVERLAY from then on: a new file, made here, of the format
    FMT (qcow2 or qed), encrypted as the disk is. The VM is to be started from the overlays
    from then on.
    """
    pairs = [pair(text, "DISK=OVERLAY") for text in overlays]
    async with options.connect(address, unmanaged=unmanaged) as vm:
        wanted = {await vm.disk(disk): file for disk, file in pairs}
        if len(wanted) < len(pairs):
            raise click.UsageError("a disk is named twice")
        async with saying_where("snapshot", list(wanted)):
            result = await vm.snapshot(wanted, format=fmt, backing_name=backing_name)
    warn(result.warnings)
    if options.json:
        emit(json.dumps(asdict(result), indent=2) + "\n")
    else:
        for one in result.overlays:
            click.echo(
                f"{printable(one.disk)}: the active layer is now {printable(one.file)}; "
                f"{printable(one.frozen)} is frozen"
            )
    return WARNED if result.warnings else 0
