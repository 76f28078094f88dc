"""`qmpblock allocate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import WARNED, Options, Rate, Size, emit, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.progress import reporting
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.cli.toolate import saying_where
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.allocation.allocate import AllocationResult

__all__ = ["command"]


@make_command
@click.argument("address")
@click.argument("disk")
@click.option("--offset", type=Size(), default=0, help="First byte (suffixes K, M, G, T).")
@click.option("--length", type=Size(), help="How many bytes; by default up to the end.")
@click.option("--full", is_flag=True, help="Give host space to what no layer holds, too.")
@click.option(
    "--independent", is_flag=True, help="Drop the backing chain afterwards. Whole disks only."
)
@click.option("--speed", type=Rate(), default=0, help="Bytes a second (suffixes K, M, G).")
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    disk: str,
    offset: int,
    length: int | None,
    full: bool,
    independent: bool,
    speed: int,
    metrics: str | None,
    unmanaged: bool,
) -> int:
    """Make a range of a running disk stand in its active layer, its content unchanged.

    What lower layers hold comes up; what no layer holds stays blank, unless --full. The guest
    goes on. Interrupted, what was done stays: it changes no content.

    --full on qcow2 and QED puts an overlay beside the image for a while, slice by slice. If
    QEMU itself dies then, run `qmpblock recover IMAGE` before the image is started again.
    """
    with recording(metrics) as recorder:
        async with options.connect(address, unmanaged=unmanaged) as vm:
            selected = await vm.disk(disk)
            what = f"allocation on {selected.name}"
            async with saying_where(what, [selected] if independent else []):
                with reporting(what) as show:
                    result = await selected.allocate(
                        offset,
                        length,
                        full=full,
                        independent=independent,
                        speed=speed,
                        progress=recorder.also(show, address, what),
                        warn=lambda text: warn((text,)),
                    )
    if options.json:
        emit(json.dumps(asdict(result), indent=2) + "\n")
    else:
        _say(result)
    return WARNED if result.warnings else 0


def _say(result: AllocationResult) -> None:
    click.echo(
        f"{printable(result.disk)}: {result.allocated:,} bytes allocated from below, "
        f"{result.reserved:,} reserved, in {result.seconds:.1f} s"
    )
    asked, done = (result.offset, result.length), (result.rounded_offset, result.rounded_length)
    if asked != done:
        click.echo(f"  rounded to clusters: offset {done[0]:,}, length {done[1]:,}")
    if result.held:
        click.echo(f"  the guest's I/O was held for {result.held * 1000:.1f} ms at the most")
