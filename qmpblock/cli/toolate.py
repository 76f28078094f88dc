"""An interrupt that comes too late: what a change had done by then stands, and that is said.

It is not undone, and whoever took it for that would start the VM from an image that is stale.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.errors import DisconnectedError, Error, NotFoundError, printable

if TYPE_CHECKING:
    from qmpblock.vm import Disk

__all__ = ["saying_where"]


@asynccontextmanager
async def saying_where(what: str, disks: Sequence[Disk]) -> AsyncIterator[None]:
    """Have an interrupt be an error where disks have another chain than before, for all that.

    :param what: is done to them, for people.
    :raise Error: what was done, and where the guest is.
    """
    before = [_files(disk) for disk in disks]
    try:
        yield
    except asyncio.CancelledError:
        if changed := await undisturbed(_changed(disks, before)):
            raise Error(
                f"interrupted too late: the {what} had taken effect", standing="; ".join(changed)
            ) from None
        raise


async def _changed(disks: Sequence[Disk], before: Sequence[tuple[str, ...]]) -> list[str]:
    """Say of disks whose chain is another one where the guest is now."""
    said = []
    for disk, files in zip(disks, before, strict=True):
        with suppress(DisconnectedError, NotFoundError):  # of QEMU's end others tell; unplugged
            await disk.refresh()
        now = _files(disk)
        if now == files:
            continue
        name, active = printable(disk.name), printable(now[0])
        if now[0] == files[0]:
            said.append(f"the chain of {name} is now {', '.join(map(printable, now))}")
            continue
        said.append(f"the active layer of {name} is now {active}: start the VM from it")
        if files[0] not in now:
            said[-1] += f", and never from {printable(files[0])}, which is stale"
    return said


def _files(disk: Disk) -> tuple[str, ...]:
    return tuple(layer.file for layer in disk.chain.layers)
