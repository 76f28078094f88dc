"""What the destination's images hold before anything is copied to them, by their exports.

And host space for all of them: of a raw image QEMU itself gives it, where zeros are written that
are to be no holes; a qcow2 image has it where it was made so (`preallocation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.errors import Error, NBDError, UnsupportedError, printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpblock.migration.look import Pair
    from qmpblock.nbd import Client

__all__ = ["ALLOCATION", "DEPTH", "make_ready"]

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
_ZERO = 2  # the flag of what reads as zeros
_STEP = 256 << 20  # bytes at once: where they are written after all, that takes its time
_OWN = 1  # the depth of what the image itself holds


async def make_ready(client: Client, pair: Pair) -> bool:
    """See that what is to be copied to is as it has to be; say whether all of it reads as zeros.

    Of one of which the top alone is copied that is never said: what it lies on shows through.

    :raise UnsupportedError: it holds something, where it must not: that would stay, where the top
        holds nothing. Or it has not all of the host space that it is to have.
    :raise Error: it cannot be given that.
    :raise NBDError: the server does not answer as it should.
    """
    if pair.top and not await _holds_nothing(client):
        raise _not_empty(pair)
    if pair.full:
        await _have_space(client, pair)
    return not pair.top and await _is_blank(client)


async def _is_blank(client: Client) -> bool:
    """Whether all of it reads as zeros.

    :raise NBDError: the server does not answer as it should.
    """
    async for flags in _extents(client, ALLOCATION):
        if not flags & _ZERO:
            return False
    return True


async def _holds_nothing(client: Client) -> bool:
    """Whether all of it is what it lies on: the image itself holds not even zeros.

    :raise NBDError: likewise.
    """
    async for depth in _extents(client, DEPTH):
        if depth == _OWN:
            return False
    return True


async def _holds_all(client: Client) -> bool:
    """Whether the image itself holds all of it, be it as zeros.

    :raise NBDError: likewise.
    """
    async for depth in _extents(client, DEPTH):
        if depth != _OWN:
            return False
    return True


async def _fill(client: Client) -> None:
    """Have zeros everywhere, with host space for all of them. What was there is gone.

    :raise Error: there is no room, or the server cannot.
    """
    try:
        step = min(client.max_effect_length, _STEP)
        for offset in range(0, client.size, step):
            length = min(step, client.size - offset)
            await client.write_zeroes(offset, length, no_hole=True)
    except NBDError as error:
        raise Error(
            f"the destination cannot give all of an image host space: {error.message}",
            remedy="make room there; or make the image with host space for all of it "
            "(preallocation=falloc), or leave the allocation out",
        ) from error


async def _extents(client: Client, context: str) -> AsyncIterator[int]:
    offset = 0
    while offset < client.size:
        asked = min(client.max_status_length, client.size - offset)
        for length, told in (await client.block_status(offset, asked))[context].tolist():
            yield told
            offset += length


async def _have_space(client: Client, pair: Pair) -> None:
    active = pair.destination.chain.active
    if active.format == "raw":
        await _fill(client)
    elif not await _holds_all(client):
        form = active.format
        raise UnsupportedError(
            f"{printable(active.file)} has not host space for all of itself, which a {form} image "
            "gets only as it is made; nothing was copied",
            remedy=f"make it anew (qemu-img create -f {form} -o preallocation=falloc FILE SIZE), "
            "with the destination's QEMU started after that; or leave the allocation out",
        )


def _not_empty(pair: Pair) -> UnsupportedError:
    file = pair.destination.chain.active.file
    return UnsupportedError(
        f"{printable(file)} holds something itself, which would stay where the active layer of "
        f"{printable(pair.source.name)} holds nothing; nothing was copied",
        remedy="make it anew (qemu-img create -f qcow2 -b BACKING -F FORMAT FILE), with the "
        "destination's QEMU started after that; or copy all layers",
    )
