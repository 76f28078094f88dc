"""What `qmpblock migrate SOURCE DESTINATION` does, and says."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import WARNED, Options, emit, warn
from qmpblock.cli.picture import write_svg
from qmpblock.cli.progress import reporting
from qmpblock.errors import Error, RequestError, printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpblock.cli.progress import Reporter
    from qmpblock.migration.diskterms import Allocation, Layers
    from qmpblock.migration.job import MigrationResult, PhaseTime
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.qemu.connection import Connection

__all__ = ["WHAT", "migrated", "said_of_guest"]

WHAT = "migration"


async def migrated(
    options: Options,
    source: Connection,
    destination: Connection,
    *,
    memory_only: bool,
    speed: int,
    quit_source: bool,
    storage_daemon: bool,
    layers: Layers,
    same_backing: bool,
    allocation: Allocation,
    means: MigrationMeans,
    over: str | None,
    also: Callable[[Reporter], Reporter],
    svg: str | None = None,
) -> int:
    """Migrate, and say how; return the exit code.

    :param also: has what is shown be told elsewhere, too.
    :param svg: the file that gets the timeline; None: none is drawn.
    """
    from qmpblock.migration.migrate import migrate

    moving = migrate(
        source,
        destination,
        memory_only=memory_only,
        speed=speed,
        quit_source=quit_source,
        storage_daemon=storage_daemon,
        means=means,
        over=over,
        layers=layers,
        same_backing=same_backing,
        allocation=allocation,
    )
    job = None
    try:
        async with moving as job:
            warn(job.warnings)
            with reporting(WHAT) as shown:
                said, show = 0, also(shown)
                async for seen in job:
                    for notice in job.notices[said:]:
                        click.echo(f"migration: {notice.text}", err=True)
                    said = len(job.notices)
                    show(seen)
    except asyncio.CancelledError:
        if job is not None and job.result is not None:
            raise Error(
                "interrupted too late: the guest had gone over to the destination",
                standing=said_of_guest(job.result),
            ) from None
        raise
    result = job.result
    assert result is not None  # leaving without an error sets it
    warn(result.warnings[len(job.warnings) :])
    drawn = svg is None or _draw(result, svg)
    if options.json:
        emit(json.dumps(asdict(result), indent=2) + "\n")
    else:
        _say(result)
    return 0 if drawn and not result.warnings else WARNED


def _draw(result: MigrationResult, path: str) -> bool:
    """Write the timeline; say so where it cannot be: the guest has gone over even so."""
    from qmpblock.cli.migrationtimeline import timeline_of
    from qmpblock.pictures.timeline import svg_timeline

    try:
        write_svg(path, svg_timeline(timeline_of(result)))
    except RequestError as error:
        warn((f"the guest has gone over, but there is no timeline: {error.message}",))
        return False
    return True


def _say(result: MigrationResult) -> None:
    click.echo(f"{said_of_guest(result)}, and all took {result.seconds:.1f} s")
    for disk in result.disks:
        click.echo(
            f"  {printable(disk.disk)}: {human_size(disk.size)}, {human_size(disk.copied)} copied "
            f"to {printable(disk.target)}" + (", the active layer alone" * (disk.layers == "top"))
        )
    for one in result.bitmaps:
        click.echo(
            f"  the dirty bitmap {printable(one.name)} of {printable(one.disk)} went along: "
            f"{human_size(one.count)} marked"
        )
    click.echo(f"  memory: {human_size(result.transferred)} sent")
    for notice in result.notices:
        click.echo(f"  after {notice.at:.1f} s: {notice.text}")
    click.echo("  " + ", ".join(f"{one.phase} {_took(one)}" for one in result.phases))
    click.echo(
        "  the source's QEMU was ended"
        if result.source == "ended"
        else "  the source stays, postmigrate: end it (quit), and never continue it"
    )


#: By run states, why a guest does not run at the destination, and what there is to be done.
_STANDS = {
    "paused": ("as somebody else had it at the source", "cont has it go on"),
    "suspended": ("as it was", "system_wakeup wakes it"),
    "io-error": (
        "for a request of its disk failed",
        "cont has it try that again: see that the disk there is well",
    ),
    "shutdown": ("for it has powered itself off", "quit ends its QEMU"),
}


def said_of_guest(result: MigrationResult) -> str:
    """Say where it is, and for how long it stood."""
    if result.destination != "running":
        shown = printable(result.destination)
        how, what = _STANDS.get(shown, ("as it had stopped at the source", "see why"))
        return f"the guest is at the destination, {shown} there, {how} ({what})"
    paused = f" ({result.paused:.1f} s of them paused)" if result.paused else ""
    return f"the guest runs at the destination; it stood for {result.downtime * 1e3:.0f} ms{paused}"


def _took(one: PhaseTime) -> str:
    time = f"{one.seconds:.1f} s" if one.seconds >= 1 else f"{one.seconds * 1e3:.0f} ms"
    return f"{time} ({human_size(round(one.rate))}/s)" if one.bytes else time
