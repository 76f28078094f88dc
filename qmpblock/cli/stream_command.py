"""`qmpblock stream`."""

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
@click.option("--top", metavar="LAYER", help="The layer to stream into; by default the active one.")
@click.option("--base", metavar="LAYER", help="Stop above this layer; by default stream it all.")
@click.option("--speed", type=Rate(), default=0, help="Bytes a second (suffixes K, M, G).")
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    disk: str,
    top: str | None,
    base: str | None,
    speed: int,
    metrics: str | None,
    unmanaged: bool,
) -> int:
    """Copy what lower layers hold into a layer of a running disk, and drop them from its chain.

    The guest goes on and sees no difference. Nothing is dropped before what was copied is on
    stable storage. Interrupted, the chain is as it was; what was copied stays.

    LAYER is a node name, a file name or @N: @0 is the active layer, @1 its backing image.
    """
    with recording(metrics) as recorder:
        async with options.connect(address, unmanaged=unmanaged) as vm:
            selected = await vm.disk(disk)
            running = selected.stream(top=top, base=base, speed=speed)
            async with saying_where("stream", [selected]):
                return await run_job(options, address, selected, running, recorder)
