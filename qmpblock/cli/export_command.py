"""`qmpblock export`."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, Size, emit, signals_go_to, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.cli.recording import Recorder
    from qmpblock.copying.exporting import Export
    from qmpblock.qemu.job import Progress

__all__ = ["command"]

_DASHES = "--"
_STDERR = 2
_EVERY = 1.0  # seconds between two looks at how far COMMAND is


class _WithCommand(click.Command):
    """A command after whose words another one's stand, behind two dashes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index(_DASHES) if _DASHES in args else len(args)
        ctx.params["words"] = tuple(args[at + 1 :])
        rest = super().parse_args(ctx, args[:at])
        if not ctx.params["words"]:
            raise click.UsageError("say what is to be run: ... -- COMMAND", ctx)
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "-- COMMAND..."]


@functools.partial(make_command, cls=_WithCommand)
@click.argument("address")
@click.argument("names", nargs=-1, required=True, metavar="DISK...")
@click.option(
    "--at",
    "moment",
    type=click.Choice(["now"]),
    default="now",
    show_default=True,
    help="Of which moment they are: of that in which COMMAND is started.",
)
@click.option(
    "--stdin", is_flag=True, help="Have COMMAND's standard input be what the one disk holds."
)
@click.option("--fleece", metavar="DIR", help="Where is kept what the guest overwrites.")
@click.option(
    "--fleece-limit", type=Size(), metavar="SIZE", help="How much of it, at most, for each disk."
)
@metrics_option
@unmanaged_option
async def command(
    options: Options,
    address: str,
    names: tuple[str, ...],
    words: tuple[str, ...],
    moment: str,
    stdin: bool,
    fleece: str | None,
    fleece_limit: int | None,
    metrics: str | None,
    unmanaged: bool,
) -> int:
    """Run a command that reads disks of a running VM as they were when it began.

    COMMAND finds a read-only NBD export of the first disk at $NBD_URI, and those of all at
    $NBD_URI_1, $NBD_URI_2, ...; of several it is one instant. The guest goes on. When COMMAND
    has ended, all is undone.

    The exit code is COMMAND's: 126 where it cannot be run, 127 where there is none, 128 and the
    number of the signal that ended it; 1 where a disk could not be read to its end, whatever
    COMMAND made of that. With --json COMMAND's standard output goes to stderr.
    """
    from qmpblock.copying.exporting import exported
    from qmpblock.copying.fleecing import Fleece

    with recording(metrics) as recorder:
        async with options.connect(address, unmanaged=unmanaged) as vm:
            disks = [await vm.disk(name) for name in names]
            async with exported(
                vm,
                disks,
                Fleece(fleece, fleece_limit),
                words,
                stdin=stdin,
                stdout=_STDERR if options.json else None,
            ) as export:
                what = f"export of {', '.join(disk.name for disk in disks)}"
                telling = _telling(recorder, address, what, export, disks[0].size * stdin)
                with signals_go_to(export.pass_on):
                    async with telling:
                        await export.wait()
    result, size = export.result, disks[0].size
    assert result is not None  # leaving without an error sets it
    if options.json:
        emit(json.dumps(_document(asdict(result)), indent=2) + "\n")
    if result.sent is not None and result.sent < size:
        click.echo(
            f"{words[0]} took no more than {human_size(result.sent)} of {human_size(size)}",
            err=True,
        )
    if export.broken is not None:
        if not result.exit_code:
            raise export.broken
        warn((str(export.broken),))
    return result.exit_code


@asynccontextmanager
async def _telling(
    recorder: Recorder, address: str, what: str, export: Export, size: int
) -> AsyncIterator[None]:
    """Have it be in the recorder's file how far COMMAND is, until this is left.

    :param size: of what it is given as its standard input; 0: what it reads by NBD nobody tells.
    """
    telling = asyncio.ensure_future(_tell(recorder, address, what, export, size))
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait({telling})


async def _tell(recorder: Recorder, address: str, what: str, export: Export, size: int) -> None:
    from qmpblock.qemu.job import Progress

    def shown_by_nobody(seen: Progress) -> None:
        """COMMAND has the terminal."""

    show = recorder.also(shown_by_nobody, address, what)
    began = moved = time.monotonic()
    sent = 0
    while True:
        now = time.monotonic()
        if export.sent not in (sent, size):
            sent, moved = export.sent, now
        if size:
            idle = 0.0 if export.sent == size else now - moved  # it has all: the rest is its own
            show(Progress("running", "copying", export.sent, size, idle=idle))
        else:
            recorder.lasting(address, what, now - began)
        await asyncio.sleep(_EVERY)


def _document(result: dict[str, Any]) -> dict[str, Any]:
    """Return the document of docs/schema/export.schema.json."""
    return {**result, "seconds": round(result["seconds"], 3)}
