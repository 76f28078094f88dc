"""LUKS headers, made again where QEMU could not time its key derivation.

Before it derives a key, QEMU measures how long a first round takes, in CPU time, and gives up
where that comes out as nothing: on a fast processor whose time is accounted in coarse ticks.
Nothing is wrong with the request, and the next attempt fares as well as the first. Measured on
7.2.22: 51 of 100 attempts failed, each independent of the others; on 11.1.2, 0 of 100.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from qmpblock.errors import CommandError, Error, JobError, ToolError

__all__ = ["TRIES", "retried"]

TRIES = 50
"""Attempts, at most: if each fails at 7 in 10, all of them do once in 50 million."""

_WORDS = "Unable to get accurate CPU usage"  # crypto/pbkdf.c

_log = logging.getLogger(__name__)


async def retried(attempt: Callable[[], Awaitable[None]]) -> None:
    """Make an image that may have a LUKS header; again, where QEMU could not time its key.

    Whatever else fails is raised as it is, at once. Cancelling cancels the attempt.

    :param attempt: makes it, from the beginning: an attempt that failed may have left half a
        header.
    :raise Error: of the last attempt; it says how many there were.
    """
    for tried in range(1, TRIES + 1):
        try:
            await attempt()
        except (CommandError, JobError, ToolError) as error:
            if _WORDS not in _said(error):
                raise
            if tried == TRIES:
                error.message += f" ({TRIES} attempts, all in vain)"
                error.remedy = "try it again; QEMU 11.1 does not have this fault, 7.2 has"
                raise
        else:
            if tried > 1:
                _log.warning('a LUKS header took %d attempts (QEMU: "%s")', tried, _WORDS)
            return


def _said(error: Error) -> str:
    """Return QEMU's own words."""
    match error:
        case CommandError():
            return error.description
        case JobError():
            return error.verdict
        case ToolError():
            return error.stderr
        case _:
            return ""
