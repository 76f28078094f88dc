"""What disks held at a point in time: a copy of it need not go over all that they did not.

A job that copies a view goes over all of it: 2 TiB that hold nothing take it a minute and a half.
So it is given a dirty bitmap of where the point may read as other than zeros. Of a view over
several layers QEMU does not tell that; two others do, asked one after the other::

    T         the point: from here on what the guest overwrites, or discards, is kept first
    1. now    the disk itself: where it reads as other than zeros by now
    2. kept   what has been kept by then: where there is anything

    at T the disk read as other than zeros in 1. or in 2., and nowhere else (F30)

For take any byte that was not zero at T. Either nobody had touched it when 1. got there: then it
was what it had been, and 1. tells of it. Or somebody had: then what it had been was kept before,
and 2., which is asked when all of 1. has been answered, tells of that. The other way round a byte
that is discarded between the two would be told of by neither.

Where what the guest overwrites cannot be kept, the point ends, and with it this reasoning: so there
is always something that the job has to read (`CopyPlan.gone_over`), which it cannot then. What is
told too much, zeros at T after all, takes time and nothing else.

Layers that are frozen nobody writes to: there 1. is all.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from qmpblock.copying.drawn import draw
from qmpblock.copying.windows import CONTEXT, ZERO
from qmpblock.errors import BusyError, NBDError, UnsupportedError
from qmpblock.export.session import Request, exports
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection

__all__ = ["draw_held"]

_UNIT = 16  # binary digits: 64 KiB
_UNITS = 22  # likewise: of as many, every other one is some 30 MiB
_PATIENCE = 5.0  # seconds to be answered in: the copy can do without


async def draw_held(vm: Connection, targets: Sequence[CopyTarget], *, held: bool) -> None:
    """Draw what is to be copied of each target's `source`, where that is worth it.

    Where it cannot be told (somebody has the VM's NBD server), nothing is drawn, and all is copied.
    Cancelling stops at once; whoever ends the change removes what was added.

    :param held: whether QEMU refuses to migrate meanwhile.
    :raise Error: QEMU refused what it should not.
    """
    for target in targets:
        if target.told_by and not target.resumed:
            with contextlib.suppress(BusyError, NBDError, UnsupportedError):
                found = target.plan.gone_over(await _told(vm, target, held=held))
                await draw(vm, target, found, held=held)


async def _told(vm: Connection, target: CopyTarget, *, held: bool) -> Ranges:
    """Return where the point may read as other than zeros."""
    requests = [Request(node, (CONTEXT,)) for node in target.told_by]
    found, patience = Ranges(), min(vm.stall, _PATIENCE)
    async with exports(
        vm.monitor, target.plan.device, requests, access=vm.nbd, stall=patience, held=held
    ) as clients:
        for client in clients:  # in their order: see above
            found = found.union(await _not_zero(client))
    return found


async def _not_zero(client: Client) -> Ranges:
    """Return where an export may read as other than zeros, in units: not too many."""
    if not client.size:  # a server is not asked about nothing
        return Ranges()
    if CONTEXT not in client.contexts:
        return Ranges([(0, client.size)])
    unit = 1 << max(_UNIT, client.size.bit_length() - _UNITS)
    at, starts, stops = 0, [], []
    while at < client.size:
        length = min(client.size - at, client.max_status_length)
        extents = (await client.block_status(at, length))[CONTEXT]
        ends = np.cumsum(extents[:, 0].astype(np.int64)) + at
        holds = (extents[:, 1] & np.uint64(ZERO)) == 0
        begins = np.concatenate(([at], ends[:-1]))
        some = Ranges.from_arrays(begins[holds], ends[holds]).align_out(unit, client.size)
        starts.append(some.starts)
        stops.append(some.stops)
        at = int(ends[-1])
    return Ranges.from_arrays(np.concatenate(starts), np.concatenate(stops)).clip(0, client.size)
