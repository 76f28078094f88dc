"""`qmpblock migrate`."""

from __future__ import annotations

import functools
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qmpblock.cli.app import WARNED, Options, Rate, emit, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.migration import WHAT, migrated
from qmpblock.cli.migrationmeans import means_options
from qmpblock.cli.picture import check_svg, svg_option
from qmpblock.cli.plannedmigration import document, said, said_finding
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.errors import printable
from qmpblock.migration.diskterms import DiskTerms

if TYPE_CHECKING:
    from qmpblock.migration.launch import Image, Launch
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.migration.rehearsal import PlannedMigration

__all__ = ["command"]

_REFUSED = 2


@make_command
@click.argument("source", required=False)
@click.argument("targets", nargs=-1, metavar="[DESTINATION | DISK=FILE...]")
@click.option(
    "--dry-run",
    "form",
    flag_value="dry-run",
    help="Migrate nothing; say what speaks against it, what it takes, and whether it would end.",
)
@click.option(
    "--command-line",
    "form",
    flag_value="command-line",
    help="Print a destination's command line: the same machine, waiting. No key is in it.",
)
@click.option(
    "--spawn",
    "form",
    flag_value="spawn",
    help="Start a destination on this host, its images made, and print its monitor's address.",
)
@click.option(
    "--storage-only",
    is_flag=True,
    help="The guest stays in its QEMU: its disks go over to new files, all at one instant.",
)
@click.option(
    "--memory-only", is_flag=True, help="The disks are not copied: both VMs have the same images."
)
@click.option(
    "--speed",
    type=Rate(),
    default=0,
    help="Bytes a second at most, of all disks, and again of the memory (K, M, G).",
)
@means_options
@click.option(
    "--over",
    metavar="nbds://HOST[:PORT]",
    help="Disks and memory go by TCP with TLS to HOST, where the destination's QEMU is to listen, "
    "with --tls-creds; PORT is the disks', the next one the memory's. nbd:// with --insecure.",
)
@click.option(
    "--list",
    "list_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Migrate what FILE, a YAML file, lists, so many at once; what is there is left alone.",
)
@svg_option
@click.option(
    "--storage-daemon",
    is_flag=True,
    help="Have a qemu-storage-daemon beside it hold the destination's images meanwhile.",
)
@click.option("--quit-source", is_flag=True, help="End the source's QEMU once the guest is gone.")
@click.option(
    "--directory",
    metavar="DIR",
    default=".",
    help="Where a destination's images are (--command-line, --spawn); else the working directory.",
)
@click.option("--qemu", metavar="PATH", help="A destination's program; else the source's.")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["qcow2", "raw"]),
    help="Of the images that are made (--command-line, --spawn, --storage-only); else each disk's.",
)
@click.option(
    "--layers",
    type=click.Choice(["all", "top"]),
    help="What goes over of a disk: the whole chain, or the active layer, onto an image over the "
    "same backing image. [default: all]",
)
@click.option(
    "--same-backing",
    is_flag=True,
    help="With --layers top: what the destination's images lie on are copies, or files that cannot "
    "be seen from here, that hold what the disks' backing images hold.",
)
@click.option(
    "--allocation",
    type=click.Choice(["thin", "full", "same"]),
    help="What of the new images has host space: what they hold, but no zeros; every byte; or the "
    "same as of the disk. Full, of a destination's command line too. [default: thin]",
)
@metrics_option
async def command(
    options: Options,
    source: str | None,
    targets: tuple[str, ...],
    form: str | None,
    storage_only: bool,
    memory_only: bool,
    speed: int,
    over: str | None,
    list_file: str | None,
    svg: str | None,
    storage_daemon: bool,
    quit_source: bool,
    directory: str,
    qemu: str | None,
    fmt: str | None,
    layers: Literal["all", "top"] | None,
    same_backing: bool,
    allocation: Literal["thin", "full", "same"] | None,
    means: MigrationMeans,
    metrics: str | None,
) -> int:
    """Have the guest of a running VM go on in another QEMU, with its disks, while it runs.

    SOURCE and DESTINATION are QMP monitors; the destination was started with -S -incoming defer,
    as --command-line prints it for SOURCE, or by --spawn, and its images are overwritten.
    Interrupted or failed, the guest goes on at the source; a destination that was sent anything by
    then is ended. With --storage-only there is no DESTINATION: the disks named go over to new
    files, as by qmpblock copy --pivot. --dry-run ends with 2 where a migration would be refused,
    and with 4 where there is something to be warned of.
    """
    if list_file is not None:
        given = (source, form, svg, memory_only, speed, storage_daemon, quit_source, means.any)
        if any((*given, storage_only, fmt, layers, same_backing, allocation, over)):
            raise click.UsageError("--list goes alone: FILE says the rest")
        from qmpblock.cli.migratelist import migrated_list

        with recording(metrics) as recorder:
            return await migrated_list(options, list_file, recorder)
    if metrics is not None and form is not None:
        raise click.UsageError("--metrics is of a migration that is made")
    if storage_only:
        if source is None or not targets or form not in (None, "dry-run"):
            raise click.UsageError("SOURCE --storage-only DISK=FILE... [--dry-run]")
        if any((memory_only, storage_daemon, svg, quit_source, over, means.any, same_backing)):
            raise click.UsageError("--storage-only: no guest goes, and no memory")
        from qmpblock.cli.copy_command import copied

        with recording(metrics) as recorder:
            return await copied(
                options,
                source,
                targets,
                dry_run=form is not None,
                unmanaged=False,
                recorder=recorder,
                at="start",
                pivot=True,
                format=fmt,
                layers=layers or "all",
                allocation="like" if allocation == "same" else allocation or "thin",
                speed=speed,
            )
    if fmt and form not in ("command-line", "spawn"):
        raise click.UsageError("--format goes with --storage-only, --command-line and --spawn")
    if allocation == "same" and form in ("command-line", "spawn"):
        raise click.UsageError(
            "--allocation same is of a migration that is made, or of its --dry-run"
        )
    terms = DiskTerms(not memory_only, layers or "all", same_backing, allocation or "thin")
    terms.check()
    destination = targets[0] if len(targets) == 1 else None
    if (
        len(targets) > 1
        or source is None
        or (form in (None, "dry-run")) != (destination is not None)
    ):
        raise click.UsageError(
            "SOURCE DESTINATION [--dry-run], SOURCE --storage-only DISK=FILE..., SOURCE "
            "--command-line, SOURCE --spawn or --list FILE"
        )
    if storage_daemon and (form not in (None, "dry-run") or memory_only):
        raise click.UsageError("--storage-daemon is of a migration with its disks")
    if over is not None and (form not in (None, "dry-run") or storage_daemon):
        raise click.UsageError("--over is of a migration, without --storage-daemon")
    if svg is not None:
        if form is not None:
            raise click.UsageError("--svg is of a migration that is made")
        check_svg(svg)
    place = str(Path(directory).absolute())
    how: dict[str, Any] = {"qemu": qemu, "format": fmt, "layers": terms.layers}
    how["preallocated"] = terms.allocation == "full"
    with recording(metrics) as recorder:
        async with options.connect(source) as here:
            if form == "spawn":
                from qmpblock.migration.spawn import spawn

                started = await spawn(here, place, **how)
                warn(started.notes)
                emit(
                    json.dumps(asdict(started), indent=2) + "\n"
                    if options.json
                    else f"{printable(started.monitor)}\n"
                )
                return 0
            if form == "command-line":
                from qmpblock.migration.launch import launch
                from qmpblock.migration.origin import read_origin

                origin = await read_origin(here)
                plan = launch(origin, directory=place, sockets=place, **how)
                emit(json.dumps(asdict(plan), indent=2) + "\n" if options.json else _written(plan))
                warn((*(f"to be added: {one}" for one in plan.missing), *plan.notes))
                return WARNED if plan.missing or plan.notes else 0
            from qmpblock.migration.managed import ask_manager
            from qmpblock.migration.rehearsal import plan_migration

            assert destination is not None  # see above
            if form is None:  # before the destination, which has not to be there to hear this
                tls = over is not None and over.startswith("nbds:")
                await ask_manager(here, terms, tls=tls)
            async with options.connect(destination) as there:
                if form is None:
                    how = {
                        "memory_only": memory_only,
                        "storage_daemon": storage_daemon,
                        "quit_source": quit_source,
                        "layers": terms.layers,
                        "same_backing": same_backing,
                        "allocation": terms.allocation,
                    }
                    how |= {"speed": speed, "means": means, "over": over}
                    show = functools.partial(recorder.also, vm=source, what=WHAT)
                    return await migrated(options, here, there, also=show, svg=svg, **how)
                planned = await plan_migration(
                    here,
                    there,
                    terms=terms,
                    speed=speed,
                    means=means,
                    over=over,
                    storage_daemon=storage_daemon,
                )
    if options.json:
        emit(json.dumps(document(planned), indent=2) + "\n")
    else:
        _say(planned)
    warn(planned.warnings)
    if planned.refused:
        return _REFUSED
    return WARNED if planned.findings or planned.warnings else 0


def _written(plan: Launch) -> str:
    """Return what a shell runs: the images, then the VM."""
    from qmpblock.migration.options import joined

    made = [
        shlex.join(["qemu-img", "create", "-f", one.format, *_how(one), one.file, str(one.size)])
        if one.secret is None
        else f"# {one.file}: {one.format}, {one.size} bytes, encrypted with the secret {one.secret}"
        + ", preallocation=falloc" * one.preallocated
        for one in plan.images
    ]
    return "".join(f"{printable(line, 4000)}\n" for line in made) + joined(plan.words) + "\n"


def _how(image: Image) -> list[str]:
    words = ["-o", "preallocation=falloc"] if image.preallocated else []
    if image.backing is not None and image.backing_format is not None:
        words += ["-b", image.backing, "-F", image.backing_format]
    return words


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
