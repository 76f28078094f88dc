"""`qmpblock job`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import Options, Rate, emit
from qmpblock.cli.app import command as make_command

if TYPE_CHECKING:
    from qmpblock.jobcontrol import Steering

__all__ = ["command"]

_VERBS: tuple[Steering, ...] = (
    "pause",
    "resume",
    "cancel",
    "complete",
    "finalize",
    "dismiss",
    "speed",
)


@make_command
@click.argument("address")
@click.argument("id")
@click.argument("verb", type=click.Choice(_VERBS))
@click.argument("rate", type=Rate(), required=False)
async def command(
    options: Options,
    address: str,
    id: str,  # noqa: A002 - the contract's word
    verb: Steering,
    rate: int | None,
) -> None:
    """Steer the job ID, one of ours: pause, resume, cancel, complete, finalize, dismiss.

    `speed RATE` limits it to so many bytes a second (0: no limit). While the command that
    started it still runs, that finalizes and dismisses it by itself; use a second monitor.
    Jobs of others are never touched.
    """
    if (rate is not None) != (verb == "speed"):
        raise click.UsageError("RATE goes with speed, and with nothing else")
    from qmpblock.jobcontrol import steer

    async with options.connect(address) as vm:
        did = await steer(vm, id, verb, rate or 0)
    if options.json:
        emit(json.dumps({"job": id, "verb": verb, "speed": rate, "did": did}) + "\n")
    else:
        click.echo(did)
