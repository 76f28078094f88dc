"""`qmpblock copy`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Unpack

import click

from qmpblock.cli.app import WARNED, Options, Rate, Size, emit, pair, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.plannedcopy import said
from qmpblock.cli.progress import reporting
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.cli.toolate import saying_where
from qmpblock.errors import Error, printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.cli.recording import Recorder
    from qmpblock.copying.job import CopyJob, CopyResult, DiskCopy
    from qmpblock.copying.latency import GuestLatency
    from qmpblock.copying.options import CopyWords
    from qmpblock.copying.planned import PlannedCopy

__all__ = ["Latency", "command", "copied", "felt", "telling_kept"]


class Latency(click.ParamType[float]):
    """A time, as seconds: of a bare number of milliseconds, or one with its unit."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it; click turns the failure into a usage error, exit code 2."""
        if isinstance(value, float):
            return value
        from qmpblock.copying.options import parse_latency

        seconds = parse_latency(str(value))
        if seconds is None:
            words = "is not a time such as 20ms, 0.5s or 20 (milliseconds)"
            self.fail(f"{value!r} {words}", param, ctx)
        return seconds


@make_command
@click.argument("address")
@click.argument("targets", nargs=-1, required=True, metavar="DISK=TARGET...")
@click.option(
    "--at",
    "moment",
    type=click.Choice(["start", "end"]),
    default=None,
    help="Of which moment the copy is: of that in which it begins (the default), or ends.",
)
@click.option(
    "--pivot", is_flag=True, help="At the end the guest goes over to the copy, and stays there."
)
@click.option("--format", metavar="FMT", help="qcow2 or raw; by default what the active layer is.")
@click.option(
    "--layers",
    type=click.Choice(["all", "top"]),
    default="all",
    show_default=True,
    help="What is copied: the whole chain, or the active layer, over the same backing image.",
)
@click.option(
    "--allocation",
    type=click.Choice(["thin", "full", "like"]),
    default="thin",
    show_default=True,
    help="What of the copy has host space: what it holds, but no zeros; every byte; or what the "
    "disk has it for.",
)
@click.option(
    "--cluster-size", type=Size(), metavar="SIZE", help="Of a qcow2 copy: 512 to 2M; else 64K."
)
@click.option("--compress", is_flag=True, help="Compress a qcow2 copy (--at start).")
@click.option("--direct", is_flag=True, help="Write past the host's page cache.")
@click.option(
    "--reflink",
    is_flag=True,
    help="Share the blocks of the disk's files, on a file system that can (--at start).",
)
@click.option("--force", is_flag=True, help="Replace a file TARGET, once the copy is whole.")
@click.option("--speed", type=Rate(), default=0, help="Bytes a second, of all disks (K, M, G).")
@click.option(
    "--latency",
    type=Latency(),
    default=0.0,
    metavar="MS",
    help="Copy no faster than lets the guest's own requests take so long.",
)
@click.option(
    "--fleece", metavar="DIR", help="Where is kept what the guest overwrites (--at start)."
)
@click.option(
    "--fleece-limit", type=Size(), metavar="SIZE", help="How much of it, at most, for each disk."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare each copy with the very point that it is of, before that is given up (--at "
    "start, files).",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from TARGET.partial, if there is one: compare it with the disk as it is now, and "
    "copy what it has not, or has otherwise.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Copy nothing; say how it would be done and why, what it takes, and how long.",
)
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    targets: tuple[str, ...],
    moment: Literal["start", "end"] | None,
    dry_run: bool,
    metrics: str | None,
    unmanaged: bool,
    **words: Unpack[CopyWords],
) -> int:
    """Copy disks of a running VM, all at one instant, while the guest goes on.

    TARGET is a new file, which bears the name TARGET.partial until all of it is on stable
    storage; a block device; or an NBD server: nbd://HOST[:PORT]/EXPORT, nbds://... (with
    --tls-creds), nbd+unix:///EXPORT?socket=PATH. A single disk can be named as ADDRESS DISK
    TARGET, too. Interrupted, there is no copy, and the guest is where it was; what was copied
    is kept as TARGET.partial, from which --resume goes on.
    """
    if words["pivot"] and moment is not None:
        raise click.UsageError("--pivot is of the end: it goes without --at")
    words["at"] = moment or "start"
    if metrics is not None and dry_run:
        raise click.UsageError("--metrics is of a copy that is made")
    with recording(metrics) as recorder:
        return await copied(
            options,
            address,
            targets,
            dry_run=dry_run,
            unmanaged=unmanaged,
            recorder=recorder,
            **words,
        )


async def copied(
    options: Options,
    address: str,
    targets: tuple[str, ...],
    *,
    dry_run: bool,
    unmanaged: bool,
    recorder: Recorder,
    **words: Unpack[CopyWords],
) -> int:
    """Copy disks of the VM at an address, and say how; return the exit code."""
    pairs = _pairs(targets)
    async with options.connect(address, unmanaged=unmanaged) as vm:
        wanted = {await vm.disk(disk): file for disk, file in pairs}
        if len(wanted) < len(pairs):
            raise click.UsageError("a disk is named twice")
        if any(_has_tls(file) for _, file in pairs):
            words["tls_creds"] = options.tls_creds
        if dry_run:
            return _say_planned(await vm.plan_copy(wanted, **words), json_wanted=options.json)
        with telling_kept() as note:
            moved = list(wanted) if words.get("pivot") else []
            async with saying_where("copy", moved), vm.copy(wanted, **words) as job:
                note(job)
                said = job.warnings  # more come while it goes
                warn(said)
                what = f"copy of {', '.join(disk.name for disk in wanted)}"
                with reporting(what) as shown:
                    show = recorder.also(shown, address, what)
                    async for seen in job:
                        show(seen)
                        if seen.ready:
                            job.completion.set()
        result = job.result
    assert result is not None  # leaving without an error sets it
    warn(result.warnings[len(said) :])
    if options.json:
        emit(json.dumps(asdict(result), indent=2) + "\n")
    else:
        _say(result)
    return WARNED if result.warnings else 0


@contextlib.contextmanager
def telling_kept() -> Iterator[Callable[[CopyJob], None]]:
    """Have a copy that is interrupted say what it leaves; an error says it itself.

    Yields what is to be called with its job.

    :raise Error: it was interrupted too late: it is made.
    """
    jobs: list[CopyJob] = []
    try:
        yield jobs.append
    except asyncio.CancelledError:
        for job in jobs:
            if job.whole:
                raise Error(
                    "interrupted too late: the copy is made",
                    standing="it is whole, on stable storage, under its name",
                ) from None
            if job.kept:
                click.echo(job.kept_words, err=True)
        raise


def _say_planned(planned: PlannedCopy, *, json_wanted: bool) -> int:
    if json_wanted:
        emit(json.dumps(asdict(planned), indent=2) + "\n")
    else:
        for line in said(planned):
            click.echo(line)
        click.echo("nothing was copied (--dry-run)")
    warn(planned.warnings)
    return WARNED if planned.warnings else 0


def _pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Read DISK=TARGET..., or DISK TARGET."""
    if len(words) == 2 and ("=" not in words[0] or "=" not in words[1]):
        return [(words[0], words[1])]
    return [pair(word, "DISK=TARGET") for word in words]


def _has_tls(target: str) -> bool:
    return target.startswith(("nbds:", "nbds+unix:"))


_OF = {
    "start": "as it was when the copy began",
    "end": "as it was when the copy ended",
    "pivot": "to which the guest has gone over",
}


def _went_on(one: DiskCopy, point: str) -> str:
    if one.missing is None or one.compared is None:
        return ""
    return (
        f"{' this time' if point == 'start' else ''}; of {human_size(one.compared)} that were "
        f"compared {human_size(one.missing)} were missing or had changed, and were copied"
        + ("" if point == "start" else f": {human_size(one.copied)} with what was written since")
    )


def _say(result: CopyResult) -> None:
    for one in result.disks:
        click.echo(
            f"{printable(one.disk)}: copied to {printable(one.target)}, {one.format}, "
            f"{human_size(one.size)}{_shape(one)}, {_OF[result.point]}"
            + _went_on(one, result.point)
            + ("; compared with it: the same" if result.verified else "")
        )
        if result.point == "pivot":
            click.echo(
                f"  the active layer is now {printable(one.target)}: start the VM from it\n"
                f"  {printable(one.source)} is stale from now on: never use it again"
            )
    if result.latency is not None:
        click.echo("  " + felt(result.latency))


def felt(guest: GuestLatency) -> str:
    """Say how the guest fared."""
    wanted = f"(wanted: {guest.wanted * 1e3:g} ms)"
    if guest.mean is None or guest.longest is None:
        return f"the guest read and wrote nothing meanwhile {wanted}"
    p99 = "" if guest.p99 is None else f", 99% of them {guest.p99 * 1e3:.1f} ms at the most"
    return (
        f"the guest's requests took {guest.mean * 1e3:.1f} ms on average{p99}, "
        f"{guest.longest * 1e3:.1f} ms at the worst moment {wanted}; it was above that "
        f"{guest.above:.0%} of the time, and the copy was kept to {human_size(guest.slowest)}/s "
        "at the least"
    )


def _shape(one: DiskCopy) -> str:
    """Say what is not as it is by default."""
    how = {"full": ", allocated in full", "like": ", allocated like the disk"}
    return how.get(one.allocation, "") + (", compressed" if one.compressed else "")
