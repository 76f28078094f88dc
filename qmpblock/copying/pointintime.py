"""A point in time: disks as they were at one instant, exported for anybody's NBD client to read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qmpblock.copying.fleecing import Fleece, fleecing
from qmpblock.export.served import check_served, serving
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["PointInTime", "point_in_time"]

DiskT = TypeVar("DiskT", bound="MappedDisk")


@dataclass(frozen=True)
class PointInTime:
    """One disk as it was, and how it is read.

    :ivar uri: of a read-only NBD export, as NBD clients take it (`nbd+unix:///NAME?socket=PATH`).
    :ivar socket: the path of its UNIX socket, to which only this user can connect; empty where the
        export is on a foreign server's TCP port (`connect`, `nbd`).
    :ivar export: its name there.
    :ivar size: of the disk, in bytes.
    """

    uri: str
    socket: str
    export: str
    size: int


@asynccontextmanager
async def point_in_time(
    vm: Connection, disks: Sequence[DiskT], fleece: Fleece
) -> AsyncIterator[dict[DiskT, PointInTime]]:
    """Export disks as they are at one instant. See `VM.point_in_time`."""
    devices = [disk.device for disk in disks]
    await ownership.ask(vm.monitor, devices)
    await check_served(vm.monitor, devices)
    # The server first: whoever has it is not waited for in the guest's way. And last, for the
    # guest does not wait either until a client has ended its handshake.
    async with (
        serving(vm.monitor, len(disks), access=vm.nbd, stall=vm.stall) as server,
        fleecing(vm, disks, fleece) as views,
        server.exports([view.node for view in views]) as exports,
    ):
        yield {
            disk: PointInTime(one.uri, one.socket, one.name, view.size)
            for disk, view, one in zip(disks, views, exports, strict=True)
        }
