"""Dirty bitmaps of our own drawing: of ranges that a backup job is to copy.

Where QEMU takes an image in memory from us, the bitmap is in one (`bitmapimage`), and five commands
do it, however many ranges there are (F37). Where not, zeros are written there to a node that holds
nothing, and whose dirty bitmap takes note (F26). That node has no better way to write zeros than to
write them, 1 GiB/s (measured, 11.1.2): so of all that one bit stands for only a block is written,
and the bit stands for as much as the ranges allow. A request takes 25 to 40 us.

Either way the bitmap is merged into one of the node that is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group
from qmpblock.copying.bitmapimage import bitmap_image
from qmpblock.copying.comparing import GRAIN
from qmpblock.errors import CommandError
from qmpblock.export.session import Request, exports
from qmpblock.names import blocker_name, left_bitmap, run_of
from qmpblock.qemu.memorynode import add_memory_node

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection
    from qmpblock.ranges import Ranges

__all__ = ["draw", "draw_node"]

_AT_ONCE = 64  # requests: of QEMU's 16 none waits for us
_BLOCK = 4096  # bytes, at most
_COARSE = 1 << 30  # bytes


async def draw(vm: Connection, target: CopyTarget, ranges: Ranges, *, held: bool) -> None:
    """Make a dirty bitmap of these ranges, of the node that is copied; it is the target's `bitmap`.

    Cancelled or failed, what was added is for whoever ends the change.

    :param held: whether QEMU refuses to migrate meanwhile.
    :raise Error: QEMU refused, or its NBD server cannot be had.
    """
    execute = vm.monitor.execute
    name, source = left_bitmap(target.node), target.source
    grain = await draw_node(vm, name, target.plan.size, ranges, held=held)
    bitmap = {"name": name, "granularity": grain, "disabled": True}
    await execute("block-dirty-bitmap-add", {"node": source, **bitmap})
    drawn = [{"node": name, "name": name}]
    await execute("block-dirty-bitmap-merge", {"node": source, "target": name, "bitmaps": drawn})
    await execute("blockdev-del", {"node-name": name})
    target.bitmap = name


async def draw_node(
    vm: Connection, name: str, size: int, ranges: Ranges, *, held: bool = False
) -> int:
    """Make a node that has a dirty bitmap of these ranges, called as it is; return its grain.

    Cancelled or failed, what was added is for whoever asked.

    :param name: one of a run's (`left_bitmap`); `size`: in bytes.
    :param held: whether QEMU refuses to migrate meanwhile.
    :raise Error: QEMU refused, or its NBD server cannot be had.
    """
    grain = _grain(ranges, size)
    if not await _have_read(vm, name, size, ranges, grain):
        await _have_noted(vm, name, size, ranges, grain, held=held)
    return grain


async def _have_read(vm: Connection, name: str, size: int, ranges: Ranges, grain: int) -> bool:
    """Have QEMU read the bitmap from an image in memory; False where it does not."""
    image = bitmap_image(name, size, ranges, grain)
    # Nothing else has this descriptor: the node that it is for is there, or cannot be had.
    descriptor = blocker_name(run_of(name))
    try:
        return image is not None and await add_memory_node(
            vm.monitor, name, "qcow2", image, descriptor=descriptor
        )
    except CommandError:
        return False  # a confined one; what else is wrong the other way will say


async def _have_noted(
    vm: Connection, name: str, size: int, ranges: Ranges, grain: int, *, held: bool
) -> None:
    """Have QEMU note what is written to a node that holds nothing."""
    execute = vm.monitor.execute
    paper = {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True}
    await execute("blockdev-add", paper)
    bitmap = {"name": name, "granularity": grain}
    await execute("block-dirty-bitmap-add", {"node": name, **bitmap})
    if len(ranges):
        request = Request(name, (), in_flight=_AT_ONCE, writable=True)
        async with exports(
            vm.monitor, None, [request], access=vm.nbd, stall=vm.stall, held=held
        ) as [client]:
            await _dirty(client, ranges, grain)


async def _dirty(client: Client, ranges: Ranges, grain: int) -> None:
    """Write to each grain of ranges, several requests at once."""
    places = _grains(ranges, grain)

    async def write() -> None:
        for at in places:
            await client.write_zeroes(at, min(_BLOCK, client.size - at))

    async with task_group() as group:
        for _ in range(_AT_ONCE):
            group.create_task(write())


def _grains(ranges: Ranges, grain: int) -> Iterator[int]:
    for start, stop in ranges:
        yield from range(start - start % grain, stop, grain)


def _grain(ranges: Ranges, size: int) -> int:
    """Return the largest unit, a power of two, in which ranges begin and end; of GRAIN at least."""
    edges = [*ranges.starts.tolist(), *(stop for stop in ranges.stops.tolist() if stop != size)]
    common = math.gcd(*edges)
    return max(GRAIN, min(common & -common or _COARSE, _COARSE))
