"""`qmpblock backup`."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Unpack

import click

from qmpblock.cli.app import WARNED, Options, Rate, Size, emit, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.backupsoutput import checked_document, list_document, said_checked, said_points
from qmpblock.cli.copy_command import Latency
from qmpblock.cli.plannedbackup import said as said_planned
from qmpblock.cli.progress import reporting
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.backups.decision import Kind
    from qmpblock.backups.job import BackupResult
    from qmpblock.backups.look import BackupWords
    from qmpblock.backups.planned import PlannedBackup
    from qmpblock.backups.point import DiskBackup
    from qmpblock.cli.recording import Recorder
    from qmpblock.vm import VM, Disk

__all__ = ["command"]


@make_command
@click.argument("address", metavar="ADDRESS | list | check")
@click.argument("directory", metavar="DIRECTORY")
@click.option(
    "--disk", "names", multiple=True, metavar="DISK", help="Which; by default all that are written."
)
@click.option(
    "--full", "kind", flag_value="full", default=None, help="Let each image hold everything."
)
@click.option(
    "--incremental",
    "kind",
    flag_value="incremental",
    help="Refuse where an image would have to hold everything.",
)
@click.option("--compress", is_flag=True, help="Compress what the images hold.")
@click.option("--speed", type=Rate(), default=0, help="Bytes a second, of all disks (K, M, G).")
@click.option(
    "--latency",
    type=Latency(),
    default=0.0,
    metavar="MS",
    help="Copy no faster than lets the guest's own requests take so long.",
)
@click.option("--fleece", metavar="DIR", help="Where is kept what the guest overwrites meanwhile.")
@click.option(
    "--fleece-limit", type=Size(), metavar="SIZE", help="How much of it, at most, for each disk."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare each image, with what it lies on, with the instant of which it is.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make none; say what it would be, disk by disk, and why, and what it takes.",
)
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    directory: str,
    names: tuple[str, ...],
    kind: Kind | None,
    dry_run: bool,
    metrics: str | None,
    unmanaged: bool,
    **words: Unpack[BackupWords],
) -> int:
    """Back up disks of a running VM into a directory, all at one instant.

    Each disk becomes a qcow2 image there, which holds what was written since the backup before,
    and lies on its image; where that cannot be, it holds everything, and it is said why. A
    directory is of one VM.

    `list DIRECTORY` says which backups there are, `check DIRECTORY` reads every byte of them, and
    says which are whole (exit code 1: not all). Neither needs the VM. A monitor of such a name is
    ./list.
    """
    if address in ("list", "check"):
        if names or kind or dry_run or unmanaged or any(words.values()):
            raise click.UsageError(f"backup {address} takes the directory alone")
        if address == "list":
            if metrics is not None:
                raise click.UsageError("backup list takes the directory alone: it is no long work")
            return await _list(options, directory)
        with recording(metrics) as recorder:
            return await _check(options, directory, recorder)
    if metrics is not None and dry_run:
        raise click.UsageError("--metrics is of a backup that is made")
    with recording(metrics) as recorder:
        async with options.connect(address, unmanaged=unmanaged) as vm:
            disks = [await vm.disk(name) for name in names] if names else await _written(vm)
            if dry_run:
                planned = await vm.plan_backup(directory, disks, kind=kind, **words)
                return _say_planned(planned, json_wanted=options.json)
            result = await _backed_up(vm, directory, disks, kind, words, recorder, address)
    if options.json:
        emit(json.dumps(_document(result), indent=2) + "\n")
    else:
        _say(result)
    return WARNED if result.warnings else 0


async def _written(vm: VM) -> list[Disk]:
    """Return the disks that the guest may write to."""
    return [disk for disk in await vm.disks() if not disk.chain.active.node.read_only]


async def _backed_up(
    vm: VM,
    directory: str,
    disks: list[Disk],
    kind: Kind | None,
    words: BackupWords,
    recorder: Recorder,
    address: str,
) -> BackupResult:
    what, job = f"backup of {', '.join(disk.name for disk in disks)}", None
    told: tuple[str, ...] = ()
    try:
        async with vm.backup(directory, disks, kind=kind, **words) as job:
            told = job.warnings
            warn(told)
            with reporting(what) as shown:
                show = recorder.also(shown, address, what)
                async for seen in job:
                    show(seen)
    except asyncio.CancelledError:
        if job is None or job.result is None:
            raise
        click.echo("too late to give it up: the backup is made", err=True)
    assert job.result is not None  # leaving without an error sets it
    warn(job.result.warnings[len(told) :])
    return job.result


def _say_planned(planned: PlannedBackup, *, json_wanted: bool) -> int:
    if json_wanted:
        emit(json.dumps(asdict(planned), indent=2) + "\n")
    else:
        for line in said_planned(planned):
            click.echo(line)
        click.echo("no backup was made (--dry-run)")
    warn(planned.warnings)
    return WARNED if planned.warnings else 0


async def _list(options: Options, directory: str) -> int:
    from qmpblock.backups import read_points

    points = read_points(directory)
    if options.json:
        emit(json.dumps(list_document(directory, points), indent=2) + "\n")
    else:
        for line in said_points(points):
            click.echo(line)
    return 0


async def _check(options: Options, directory: str, recorder: Recorder) -> int:
    from qmpblock.backups import check_backups

    what = f"check of {directory}"
    with reporting(what) as show:
        show = recorder.also(show, "", what)
        found = await check_backups(directory, progress=show, stall=options.stall)
    if options.json:
        emit(json.dumps(checked_document(found), indent=2) + "\n")
    else:
        for line in said_checked(found):
            click.echo(line)
    return 0 if found.whole else 1


def _document(result: BackupResult) -> dict[str, object]:
    """Return the document of docs/schema/backup.schema.json."""
    return {
        "directory": result.directory,
        "point": result.point.as_json(),
        "seconds": result.seconds,
        "held": result.held,
        "verified": result.verified,
        "warnings": list(result.warnings),
    }


def _say(result: BackupResult) -> None:
    point = result.point
    for one in point.disks:
        how = f"full: {one.reason}" if one.parent is None else f"on {printable(one.parent)}"
        click.echo(
            f"{printable(one.disk)}: {printable(one.file)}, {human_size(one.length)}, {how}"
            + ("; compared with the disk: the same" if result.verified else "")
        )
        click.echo(f"  {_next(one)}")
    click.echo(f"backup {point.when} is made, in {printable(result.directory)}")


def _next(one: DiskBackup) -> str:
    """Say what the next backup of a disk can be."""
    if not one.bitmap:
        return "the next one will be full"
    if not one.persistent:
        return (
            "the next one can be incremental as long as this QEMU runs: the disk's image, "
            f"{printable(one.format)}, does not keep what was written since"
        )
    return "the next one can be incremental, also when the VM was shut down"
