"""Whether the destination's images have room for what is copied to them, where they are seen.

What a disk holds takes a map of it, and that an export for a moment. So it is mapped only where
there would be too little room for all of its bytes. None is counted twice: what an image takes
already it can be given again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from qmpblock.errors import BusyError, CommandError, GraphError, NBDError, UnsupportedError
from qmpblock.host.space import HostSpace
from qmpblock.mapping import MappedDisk
from qmpblock.migration.compare import Finding
from qmpblock.migration.predict import Room, lacking

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice
    from qmpblock.migration.diskterms import DiskTerms
    from qmpblock.migration.machine import GuestDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["data_of", "find_room", "without_room"]

_Both = tuple["GuestDisk", "GuestDisk"]


async def find_room(
    source: Connection,
    wanted: Iterable[_Both],
    terms: DiskTerms,
    graph: BlockGraph | None = None,
) -> tuple[Finding, ...]:
    """Say on which file systems there is too little room. Reads both VMs' figures, and maps disks.

    :param wanted: the disks that are copied, as they are at both ends.
    :param graph: the source's, where it has just been read.
    """
    copied = list(wanted)
    found = without_room(copied, {here.name: here.size for here, _ in copied})
    if not found or terms.allocation == "full":
        return found
    known = await source.graph() if graph is None else graph
    devices = {device.name: device for device in known.disks()}
    data = {
        here.name: await data_of(source, devices[here.name], top=terms.layers == "top")
        for here, _ in copied
    }
    return without_room(copied, data)


def without_room(wanted: Iterable[_Both], needed: Mapping[str, int | None]) -> tuple[Finding, ...]:
    """Say on which file systems of this host there is too little room.

    :param needed: bytes that are to have host space there, by the disks' names at the source; None
        where that cannot be told: it is no reason to refuse.
    """
    return tuple(Finding("room", text) for text in lacking(list(_rooms(wanted, needed))))


async def data_of(source: Connection, device: DiskDevice, *, top: bool) -> int | None:
    """Return how much of a disk is data; `top`: of its active layer alone.

    None where no map of it can be had.
    """
    try:
        seen = await MappedDisk(source, device).map()
    except (BusyError, CommandError, GraphError, NBDError, UnsupportedError):
        return None
    return seen.where(present=True, zero=False, depth=0 if top else None).total


def _rooms(wanted: Iterable[_Both], needed: Mapping[str, int | None]) -> Iterator[Room]:
    for here, there in wanted:
        amount = needed[here.name]
        if amount is None or not there.here or there.on_device or there.zeroes != "off":
            continue  # it has what it has; or what is zeros in the data need take none
        with contextlib.suppress(OSError):  # its name has gone
            space = HostSpace.of(there.here)
            yield Room(there.file, space.device, max(0, amount - (there.taken or 0)), space.free)
