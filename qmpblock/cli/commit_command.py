"""`qmpblock commit`."""

from __future__ import annotations

import click

from qmpblock.cli.app import Options, Rate, unmanaged_option
from qmpblock.cli.app import command as make_command
from qmpblock.cli.joboutput import run_job
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.cli.toolate import saying_where

__all__ = ["command"]


@make_command
@click.argument("address")
@click.argument("disk")
@click.option("--top", metavar="LAYER", help="The uppermost layer; by default the active one.")
@click.option("--base", metavar="LAYER", help="The layer that takes it; by default the lowest.")
@click.option("--speed", type=Rate(), default=0, help="Bytes a second (suffixes K, M, G).")
@click.option(
    "--throttle-guest",
    type=Rate(),
    default=0,
    metavar="RATE",
    help="Slow the guest's I/O on this disk down to RATE bytes a second, until the pivot, if it "
    "writes faster than the job copies.",
)
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    disk: str,
    top: str | None,
    base: str | None,
    speed: int,
    throttle_guest: int,
    metrics: str | None,
    unmanaged: bool,
) -> int:
    """Copy what upper layers of a running disk hold into a lower one, and drop them.

    If the active layer is among them, the guest moves on to the base at the end, and the VM
    is to be started from the base from then on. The base is written to: no other disk may
    depend on it. Interrupted, the chain is as it was.

    LAYER is a node name, a file name or @N: @0 is the active layer, @1 its backing image.
    """
    with recording(metrics) as recorder:
        async with options.connect(address, unmanaged=unmanaged) as vm:
            selected = await vm.disk(disk)
            running = selected.commit(
                top=top, base=base, speed=speed, throttle_guest=throttle_guest
            )
            async with saying_where("commit", [selected]):
                return await run_job(options, address, selected, running, recorder)
