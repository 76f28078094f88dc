"""Options of `qmpblock migrate` that have the migration of a busy guest come to its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

import click

__all__ = ["means_options"]

_OPTIONS = (
    click.option(
        "--downtime-limit",
        type=click.IntRange(min=1),
        metavar="MS",
        help="How long the guest may stand for the last of its memory; else as the VM says (300).",
    ),
    click.option(
        "--auto-converge",
        is_flag=True,
        help="Slow the guest's CPUs down while it writes to its memory faster than it is sent.",
    ),
    click.option(
        "--write-blocking-after",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Have the guest's writes wait for the destination, where disks have not caught up by "
        "then. QEMU 8.2 and newer.",
    ),
    click.option(
        "--multifd",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Have the memory go through N channels, each a connection of its own. QEMU 10.0 and "
        "newer.",
    ),
    click.option(
        "--pause-after",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Pause the guest at the source, where it has not gone over by then, until it has.",
    ),
    click.option(
        "--longest-pause",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="For how long it may be paused; it is not before that suffices. Default: 60.",
    ),
)

_Work = Callable[..., Coroutine[Any, Any, int | None]]


def means_options(work: _Work) -> _Work:
    """Give a command these options; it gets them as one `means`, a `MigrationMeans`."""

    @functools.wraps(work)
    async def call(
        *args: Any,
        downtime_limit: int | None,
        auto_converge: bool,
        write_blocking_after: float | None,
        multifd: int | None,
        pause_after: float | None,
        longest_pause: float | None,
        **rest: Any,
    ) -> int | None:
        from qmpblock.migration.means import LONGEST_PAUSE, MigrationMeans

        means = MigrationMeans(
            (downtime_limit or 0) / 1e3,
            auto_converge,
            write_blocking_after or 0.0,
            multifd or 0,
            pause_after or 0.0,
            longest_pause or LONGEST_PAUSE,
        )
        return await work(*args, means=means, **rest)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call
