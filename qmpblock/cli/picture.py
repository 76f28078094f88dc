"""Pictures that a command writes to a file (--svg)."""

from __future__ import annotations

import click

from qmpblock.errors import RequestError, printable

__all__ = ["check_svg", "svg_option", "write_svg"]

_BEGINS = (b"<?xml", b"<svg")


svg_option = click.option(
    "--svg",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Write a picture to FILE.",
)


def check_svg(path: str) -> None:
    """Refuse, before anything is done, a file that `write_svg` would leave as it is.

    :raise RequestError: it holds something else than a picture, or cannot be read.
    """
    from qmpblock.host.ourfiles import check_kind

    try:
        check_kind(path, _BEGINS)
    except OSError as error:
        raise _not_written(path, error.strerror) from None


def write_svg(path: str, text: str) -> None:
    """Write a picture; a file that holds anything else is left as it is.

    :raise RequestError: it cannot be written.
    """
    from qmpblock.host.ourfiles import write_file

    try:
        write_file(path, text.encode(), _BEGINS)
    except OSError as error:
        raise _not_written(path, error.strerror) from None


def _not_written(path: str, why: str | None) -> RequestError:
    return RequestError(f"cannot write {printable(path)}: {why}")
