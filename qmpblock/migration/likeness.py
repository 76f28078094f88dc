"""Zeros that have host space at the source get it at the destination, where that is asked for.

By fallocate(2), which touches no byte, once the disks are as far as the guest: before, a mirror has
zeros take none. So the images have to be raw files on this host.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpblock.errors import UNTOUCHED, Error, UnsupportedError, printable
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.graph.places import Place
from qmpblock.host.borrowed import in_the_name_of, open_as_it_has
from qmpblock.host.fallocate import keep_size
from qmpblock.host.handed import User
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.space import HostSpace
from qmpblock.mapping import MappedDisk

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection
    from qmpblock.ranges import Ranges

__all__ = ["check_likeness", "reserve_alike", "reserved_zeros"]


async def reserved_zeros(vm: Connection, device: DiskDevice, *, top: bool) -> Ranges:
    """Return what of a disk reads as zeros and has host space; `top`: of its active layer."""
    layers = await MappedDisk(vm, device).layers()
    seen = AllocationMap.stack([one.map for one in (layers[:1] if top else layers)])
    return seen.where(reserved=True)


def check_likeness(vm: Connection, device: DiskDevice, zeros: Ranges) -> None:
    """Refuse where an image cannot be given that host space, or there is no room for it.

    :param device: the destination's.
    :raise UnsupportedError: says why; nothing was touched.
    """
    if not zeros:
        return
    active, place, why = device.chain.active, _place(vm, device), ""
    if active.format != "raw":
        why = f"a {active.format} image would have none: a mirror has zeros take none in it"
    elif place is None:
        why = "it is no file that can be seen from here"
    elif not HostSpace.of(place.here).leaves(zeros.total):
        why = "there is no room for them"
    if why:
        raise UnsupportedError(
            f"{zeros.total} bytes of zeros have host space at the source, and are to have it in "
            f"{printable(active.file)}, too (allocation same): {why}",
            standing=UNTOUCHED,
            remedy="take allocation thin, or full; or give it a raw image on this host",
        )


async def reserve_alike(vm: Connection, device: DiskDevice, zeros: Ranges) -> None:
    """Give ranges of a destination's image host space, in the name of its QEMU's user.

    :raise Error: that cannot be; the image is as it was, or has some of it.
    """
    if not zeros:
        return
    pid, place = vm.monitor.peer_pid, _place(vm, device)
    if pid is None or place is None:
        raise Error(f"the file of {printable(device.chain.active.file)} is not seen any more")
    user = User.of_process(pid).uid
    ranges = [(start, stop - start) for start, stop in zeros]
    await asyncio.to_thread(_reserve, pid, place.here, user, ranges)


def _reserve(pid: int, path: str, user: int, ranges: Sequence[tuple[int, int]]) -> None:
    try:
        fd = open_as_it_has(pid, path)
        try:
            with in_the_name_of(user):
                for offset, length in ranges:
                    keep_size(fd, offset, length)
        finally:
            os.close(fd)
    except OSError as error:
        raise Error(
            f"cannot reserve space in {printable(path)}: {error.strerror}",
            remedy="make room there, or leave the allocation out",
        ) from None


def _place(vm: Connection, device: DiskDevice) -> Place | None:
    active = device.chain.active
    found = OpenFiles(vm.monitor.peer_pid).place(active.storage or active.node)
    return found if isinstance(found, Place) else None
