"""What the commands `stream` and `commit` share: they run one job and say how it ended."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import WARNED, Options, emit, warn
from qmpblock.cli.progress import reporting
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.chains.jobs import ChainJob, Outcome
    from qmpblock.cli.recording import Recorder
    from qmpblock.vm import Disk

__all__ = ["run_job"]


async def run_job(
    options: Options,
    address: str,
    disk: Disk,
    running: AbstractAsyncContextManager[ChainJob],
    recorder: Recorder,
) -> int:
    """Run a stream or commit to its end; return the exit code."""
    async with running as job:
        warn(job.warnings)
        what = f"{job.type} of {disk.name}"
        with reporting(what) as shown:
            show = recorder.also(shown, address, what)
            async for seen in job:
                show(seen)
                if seen.ready:
                    job.complete()
    outcome = job.outcome
    assert outcome is not None  # leaving without an error sets it
    warn(outcome.warnings[len(job.warnings) :])
    if options.json:
        emit(json.dumps(asdict(outcome), indent=2) + "\n")
    else:
        _say(outcome)
    return WARNED if outcome.warnings else 0


def _say(outcome: Outcome) -> None:
    if not outcome.changed:
        click.echo(
            f"nothing to do: {printable(outcome.disk)} has no such layers to {outcome.operation}"
        )
        return
    click.echo(
        f"{outcome.operation} of {printable(outcome.disk)}: done in {outcome.seconds:.1f} s"
        + (
            f"; {outcome.made_explicit:,} bytes of a short layer's zeros made explicit"
            if outcome.made_explicit
            else ""
        )
    )
    for file in outcome.left:
        click.echo(f"  no longer in the chain: {printable(file)}")
    if outcome.pivoted:
        click.echo(f"  the active layer is now {printable(outcome.active)}: start the VM from it")
        if outcome.opened:
            click.echo(
                f"  its name does not suffice; it is open as {printable(outcome.opened, 4000)}"
            )
        if outcome.left[0] not in outcome.nameless:  # of which a warning tells
            click.echo(f"  {printable(outcome.left[0])} is stale from now on: never use it again")
