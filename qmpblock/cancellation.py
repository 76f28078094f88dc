"""Work that must not be left half done when its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["undisturbed"]

_T = TypeVar("_T")


async def undisturbed(work: Awaitable[_T]) -> _T:
    """Finish `work` even when cancelled meanwhile, then be cancelled.

    A failure of the work is raised all the same: it says what was not finished.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
