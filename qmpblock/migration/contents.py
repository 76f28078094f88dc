"""What the destination's images hold before anything is copied to them, as their exports tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpblock.nbd import Client

__all__ = ["ALLOCATION", "DEPTH", "holds_nothing", "is_blank"]

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
_ZERO = 2  # the flag of what reads as zeros
_OWN = 1  # the depth of what the image itself holds


async def is_blank(client: Client) -> bool:
    """Whether all of it reads as zeros.

    :raise NBDError: the server does not answer as it should.
    """
    async for flags in _extents(client, ALLOCATION):
        if not flags & _ZERO:
            return False
    return True


async def holds_nothing(client: Client) -> bool:
    """Whether all of it is what it lies on: the image itself holds not even zeros.

    :raise NBDError: likewise.
    """
    async for depth in _extents(client, DEPTH):
        if depth == _OWN:
            return False
    return True


async def _extents(client: Client, context: str) -> AsyncIterator[int]:
    offset = 0
    while offset < client.size:
        asked = min(client.max_status_length, client.size - offset)
        for length, told in (await client.block_status(offset, asked))[context].tolist():
            yield told
            offset += length
