"""`qmpblock restore`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.cli.progress import reporting
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.backups.restore import Restored

__all__ = ["command"]


@make_command
@click.argument("directory", metavar="DIRECTORY")
@click.argument("target", metavar="TARGET_DIRECTORY")
@click.option(
    "--at",
    metavar="WHEN",
    help="A backup's name, or a time such as 2026-11-30T11:05: the newest one that is not younger. "
    "By default the newest.",
)
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Which; by default all of it.")
@click.option("--force", is_flag=True, help="Replace files that are there already.")
@metrics_option
async def command(
    options: Options,
    directory: str,
    target: str,
    at: str | None,
    disks: tuple[str, ...],
    force: bool,
    metrics: str | None,
) -> int:
    """Restore disks from a directory of backups; no VM is needed.

    Each becomes an image DISK.qcow2 or DISK.raw, of the format that the disk had, which holds
    everything by itself. First every byte of the backups that are needed is proven to be what it
    was. All or none; interrupted, there is none.
    """
    from qmpblock.backups import restore

    what = f"restore from {directory}"
    with recording(metrics) as recorder, reporting(what) as show:
        found = await restore(
            directory,
            target,
            at=at,
            disks=disks,
            force=force,
            progress=recorder.also(show, "", what),
            stall=options.stall,
        )
    if options.json:
        emit(json.dumps(asdict(found), indent=2) + "\n")
    else:
        _say(found)
    return 0


def _say(found: Restored) -> None:
    for one in found.disks:
        click.echo(
            f"{printable(one.disk)}: restored to {printable(one.target)}, {one.format}, "
            f"{human_size(one.size)}, as of {found.time}"
        )
