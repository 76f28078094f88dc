"""`qmpblock recover`."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qmpblock.cli.app import WARNED, Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.cli.progress import reporting_many
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.errors import (
    UNTOUCHED,
    ConnectError,
    Error,
    MonitorError,
    NotFoundError,
    RecordError,
    UndecidedError,
    printable,
)

if TYPE_CHECKING:
    from qmpblock.changes.imagerecovery import ImageRecovery
    from qmpblock.changes.step import Step
    from qmpblock.cli.progress import Reporter
    from qmpblock.cli.recording import Recorder
    from qmpblock.qemu.job import Progress
    from qmpblock.recovery import Recovery
    from qmpblock.vm import VM

__all__ = ["command"]

_NO_MIGRATION = (
    "no migration of ours was broken off between these VMs, as far as they and the journals here "
    "tell"
)


@make_command
@click.argument("targets", nargs=-1, required=True, metavar="ADDRESS | IMAGE...")
@click.option("--dry-run", is_flag=True, help="Print what would be done and why; change nothing.")
@click.option("--undo", is_flag=True, help="Undo what was not finished (the default).")
@click.option("--continue", "carry_on", is_flag=True, help="Carry jobs on to their end instead.")
@click.option(
    "--check",
    is_flag=True,
    help="Only tell, by the exit code, whether recovery is needed: 0 no, 4 yes.",
)
@click.option(
    "--force",
    type=click.Choice(["source", "destination"]),
    help="With ADDRESS, of a migration of which a person has to decide: the side on which the "
    "guest is to go on. Only where it certainly runs on neither.",
)
@click.option(
    "--believe-journal",
    is_flag=True,
    help="With IMAGE: act upon a journal beside it, too, that is not proven to be ours. Only where "
    "nobody who is not trusted can write to that directory.",
)
@metrics_option
async def command(
    options: Options,
    targets: tuple[str, ...],
    dry_run: bool,
    undo: bool,
    carry_on: bool,
    check: bool,
    force: Literal["source", "destination"] | None,
    believe_journal: bool,
    metrics: str | None,
) -> int:
    """Undo, or carry on, what a qmpblock that died left behind.

    With ADDRESS: in a VM that lives. A guest that is held by an unfinished pivot is freed
    before anything else. Of a migration: either side, or both. One side has the guest afterwards;
    the other one is ended. Where that cannot be told, a person decides.

    With IMAGE...: where QEMU died in the middle of a change. Says which image to start the
    VM from, and removes what was made for nothing. Exit code 4: from another one than before.
    """
    images = [target for target in targets if _is_image(target)]
    for wrong, words in (
        (undo and carry_on, "--undo and --continue exclude each other"),
        (0 < len(images) < len(targets), "give ADDRESS, or images, not both"),
        (images and (undo or carry_on), "--undo and --continue go with ADDRESS: the QEMU is gone"),
        (images and force, "--force goes with ADDRESS"),
        (believe_journal and not images, "--believe-journal goes with IMAGE"),
        (
            metrics and (not carry_on or dry_run or check),
            "--metrics goes with --continue: the rest takes no time",
        ),
        (len(targets) > 2 and not images, "give one ADDRESS, or the two of a migration"),
    ):
        if wrong:
            raise click.UsageError(words)
    if images:
        return await _recover_images(
            options, images, dry_run=dry_run, check=check, believe=believe_journal
        )
    with recording(metrics) as recorder:
        return await _recover_running(
            options,
            targets,
            recorder,
            carry_on=carry_on,
            dry_run=dry_run,
            check=check,
            force=force,
        )


async def _recover_running(
    options: Options,
    targets: tuple[str, ...],
    recorder: Recorder,
    *,
    carry_on: bool,
    dry_run: bool,
    check: bool,
    force: Literal["source", "destination"] | None,
) -> int:
    """Recover what was left in VMs that live."""
    planned = dry_run or check
    try:
        migration = await _recover_migration(
            options, targets, carry_on=carry_on, planned=planned, force=force
        )
    except (RecordError, UndecidedError) as error:
        return _unread(options, error, check=check)
    if migration is not None:
        return _show(options, [migration], planned=planned, check=check)
    if len(targets) > 1 and check:
        return _show(options, [], planned=True, check=True, none=_NO_MIGRATION)
    if len(targets) > 1 or force:
        raise NotFoundError(
            _NO_MIGRATION,
            remedy="to recover what else was left in one VM: qmpblock recover ADDRESS",
        )
    return await _recover_vm(
        options, targets[0], recorder, carry_on=carry_on, dry_run=dry_run, check=check
    )


def _is_image(target: str) -> bool:
    """Whether it is a file that is there and no socket, or one that a change of ours made."""
    try:
        mode = Path(target).stat().st_mode
    except FileNotFoundError:
        from qmpblock.changes.imagerecovery import is_about

        return is_about(target)
    except (OSError, ValueError):
        return False
    return not stat.S_ISSOCK(mode)


@asynccontextmanager
async def _connected(options: Options, target: str) -> AsyncIterator[VM]:
    """Connect to what is no image that is there; nothing may be there at all."""
    async with AsyncExitStack() as stack:
        try:
            vm = await stack.enter_async_context(options.connect(target))
        except ConnectError as error:
            if target.startswith(("unix:", "tcp:")) or os.path.lexists(target):
                raise
            raise ConnectError(
                f"there is neither a monitor nor an image at {printable(target)}",
                standing=UNTOUCHED,
                remedy=f"of a monitor: {error.remedy}. Of an image: it has been removed or "
                "renamed; give the name of one that is there",
            ) from None
        yield vm


async def _recover_migration(
    options: Options,
    targets: Sequence[str],
    *,
    carry_on: bool,
    planned: bool,
    force: Literal["source", "destination"] | None,
) -> Recovery | None:
    """Recover the migration that these VMs are of; None where they are of none."""
    from qmpblock.migration.recover import recover_migration

    try:
        return await recover_migration(
            *targets,
            carry_on=carry_on,
            force=force,
            dry_run=planned,
            tell=None if planned else _tell,
            stall=options.stall,
        )
    except MonitorError:
        if len(targets) > 1 or force:
            raise
        return None  # whoever needs the monitor says what is wrong with it


async def _recover_vm(
    options: Options,
    address: str,
    recorder: Recorder,
    *,
    carry_on: bool,
    dry_run: bool,
    check: bool,
) -> int:
    planned = dry_run or check
    shown: dict[str, Reporter] = {}

    def follow(what: str, seen: Progress) -> None:
        if what not in shown:
            shown[what] = recorder.also(begin(what), address, what)
        shown[what](seen)

    with reporting_many() as begin:
        async with _connected(options, address) as vm:
            try:
                recoveries = await vm.recover(
                    carry_on=carry_on,
                    dry_run=planned,
                    tell=None if planned else _tell,
                    progress=follow,
                )
            except RecordError as error:
                return _unread(options, error, check=check)
    return _show(options, recoveries, planned=planned, check=check)


def _show(
    options: Options,
    recoveries: Sequence[Recovery],
    *,
    planned: bool,
    check: bool,
    none: str = "nothing of ours is left in this VM",
) -> int:
    if options.json:
        emit(json.dumps([_document(one) for one in recoveries], indent=2) + "\n")
    elif not recoveries:
        click.echo(f"nothing to recover: {none}")
    else:
        for one in recoveries:
            _say(one, planned=planned)
    # A controller at work, such as a watcher, is no reason to recover.
    needed = any(step.verb != "leave" for one in recoveries for step in one.steps)
    return WARNED if check and needed else 0


def _tell(what: str, step: Step) -> None:
    click.echo(f"{what}: {step}", err=True)


def _document(one: Recovery) -> dict[str, Any]:
    return {
        "what": one.what,
        "run": one.run,
        "steps": [{"verb": s.verb, "what": s.what, "why": s.why} for s in one.steps],
        "done": one.done,
    }


def _say(one: Recovery, *, planned: bool) -> None:
    ended = {True: "it took effect", False: "it did not take effect", None: ""}[one.done]
    click.echo(one.what + (f": {ended}" if ended and not planned else ""))
    for step in one.steps:
        click.echo(f"  {'would ' if planned else ''}{step}")


async def _recover_images(
    options: Options, images: list[str], *, dry_run: bool, check: bool, believe: bool
) -> int:
    from qmpblock.changes.imagerecovery import recover_images
    from qmpblock.changes.survey import survey

    try:
        recoveries = await recover_images(images, dry_run=dry_run or check, believe=believe)
    except RecordError as error:
        return _unread(options, error, check=check)
    doubtful = survey(tuple(map(os.path.realpath, images))).distrusted
    _show_images(options, recoveries, doubtful=bool(doubtful))
    if check:
        return WARNED if recoveries or doubtful else 0
    return WARNED if doubtful or any(one.verdict.stale for one in recoveries) else 0


def _show_images(options: Options, recoveries: Sequence[ImageRecovery], *, doubtful: bool) -> None:
    if options.json:
        emit(json.dumps([_image_document(one) for one in recoveries], indent=2) + "\n")
        return
    for one in recoveries:
        click.echo(f"{one.what}: {one.describe()}")
    if not recoveries and doubtful:
        click.echo("no journal that can be believed is about these images")
    elif not recoveries:
        click.echo("safe: no change of ours to these images was interrupted")


def _unread(options: Options, error: Error, *, check: bool) -> int:
    """Say what cannot be read, or decided. If recovery is needed nobody can say no: so it is."""
    if not check:
        raise error
    if options.json:
        emit("[]\n")
    click.echo(f"qmpblock: {error}", err=True)
    return WARNED


def _image_document(one: ImageRecovery) -> dict[str, Any]:
    return {
        "what": one.what,
        "run": one.run,
        "start": list(one.verdict.start),
        "stale": list(one.verdict.stale),
        "committed": [overlay for overlay, _ in one.verdict.commit],
        "removed": list(one.removed),
        "opened": one.opened,
        "why": one.verdict.why,
    }
