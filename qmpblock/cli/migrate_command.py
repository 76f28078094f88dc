"""`qmpblock migrate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import WARNED, Options, Rate, emit
from qmpblock.cli.app import command as make_command
from qmpblock.cli.plannedmigration import document, said, said_finding

if TYPE_CHECKING:
    from qmpblock.migration.rehearsal import PlannedMigration

__all__ = ["command"]

_REFUSED = 2


@make_command
@click.argument("source")
@click.argument("destination")
@click.option(
    "--dry-run",
    is_flag=True,
    required=True,
    help="Migrate nothing; say what speaks against it, what it takes, and whether it would end.",
)
@click.option(
    "--memory-only", is_flag=True, help="The disks are not copied: both VMs have the same images."
)
@click.option(
    "--speed", type=Rate(), default=0, help="What the wire carries, bytes a second (K, M, G)."
)
async def command(
    options: Options,
    source: str,
    destination: str,
    dry_run: bool,
    memory_only: bool,
    speed: int,
) -> int:
    """Say what a migration of a running VM, with its disks, into another QEMU would be.

    SOURCE and DESTINATION are QMP monitors; the destination was started with -S -incoming defer.
    Ends with 2 where it would be refused, and with 4 where there is something to be warned of.
    """
    assert dry_run  # click requires it
    from qmpblock.migration.rehearsal import plan_migration

    async with options.connect(source) as here, options.connect(destination) as there:
        planned = await plan_migration(here, there, copies=not memory_only, speed=speed)
    if options.json:
        emit(json.dumps(document(planned), indent=2) + "\n")
    else:
        _say(planned)
    if planned.refused:
        return _REFUSED
    return WARNED if planned.findings else 0


def _say(planned: PlannedMigration) -> None:
    for line in said(planned):
        click.echo(line)
    for finding in planned.findings:
        for line in said_finding(finding):
            click.echo(line, err=True)
    click.echo(
        "it would be refused; nothing was touched"
        if planned.refused
        else "nothing was migrated (--dry-run)"
    )
