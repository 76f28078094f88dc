"""`qmpblock verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.cli.progress import reporting
from qmpblock.cli.recording import metrics_option, recording
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.copying.verify import Longer, Verification

__all__ = ["command"]

_DIFFERENT = 1  # exit code


@make_command
@click.argument("first", metavar="IMAGE")
@click.argument("second", metavar="IMAGE")
@click.option(
    "--format",
    "fmt",
    metavar="FMT",
    help="Format of the first, where its name does not tell; never probed.",
)
@click.option("--second-format", metavar="FMT", help="Format of the second.")
@click.option(
    "--longer",
    type=click.Choice(["no", "zeros", "any"]),
    default="no",
    show_default=True,
    help="Whether one may be longer: not at all, by zeros, or by whatever is there.",
)
@click.option("--all", is_flag=True, help="Go on after the first difference, and count the bytes.")
@metrics_option
async def command(
    options: Options,
    first: str,
    second: str,
    fmt: str | None,
    second_format: str | None,
    longer: Longer,
    all: bool,  # noqa: A002 - the option's name
    metrics: str | None,
) -> int:
    """Compare what guests would read from two closed images.

    Each counts with all that lies below it, whatever their formats; holes and written zeros are
    equal. An image that a running VM writes to is refused.

    Exit codes: 0 they are equal, 1 they differ, 2 wrong request.
    """
    from qmpblock.copying.verify import verify_images

    what = f"verify {first}"
    with recording(metrics) as recorder, reporting(what) as show:
        found = await verify_images(
            first,
            second,
            format=fmt,
            second_format=second_format,
            longer=longer,
            all=all,
            progress=recorder.also(show, "", what),
            stall=options.stall,
        )
    if options.json:
        emit(json.dumps(_document(found), indent=2) + "\n")
    else:
        click.echo(_sentence(found, first, second))
    return 0 if found.equal else _DIFFERENT


def _document(found: Verification) -> dict[str, Any]:
    """Return the document of docs/schema/verify.schema.json."""
    return {
        "equal": found.equal,
        "sizes": list(found.sizes),
        "first_difference": found.first_difference,
        "differing": found.differing,
        "unequal": None if found.unequal is None else [list(one) for one in found.unequal],
        "compared": found.compared,
        "seconds": round(found.seconds, 3),
    }


def _sentence(found: Verification, first: str, second: str) -> str:
    names = f"{printable(first)} and {printable(second)}"
    if found.equal:
        return f"equal: {names}, {found.compared:,} bytes"
    if found.first_difference is None:
        return (
            f"different: {names}: one is of {found.sizes[0]:,} bytes, the other of "
            f"{found.sizes[1]:,}; they were not read (--longer zeros: if the rest is zeros, "
            "--longer any: whatever it is)"
        )
    counted = "" if found.differing is None else f"; {found.differing:,} bytes differ in all"
    return f"different: {names}: from offset {found.first_difference:,} on{counted}"
