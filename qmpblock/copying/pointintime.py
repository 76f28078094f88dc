"""A point in time: disks as they were at one instant, exported for anybody's NBD client to read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qmpblock.address import TCPAddress, UnixAddress, parse_address
from qmpblock.copying.fleecing import PATIENCE, Fleece, fleecing
from qmpblock.copying.windows import CONTEXT
from qmpblock.errors import Error, NBDError, StalledError
from qmpblock.export.served import check_served, serving
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpblock.mapping import MappedDisk
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection

__all__ = ["PointInTime", "opened", "point_in_time", "why_ended"]

_LITTLE = 512  # bytes that tell whether a point can be read at all

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


async def opened(vm: Connection, point: PointInTime) -> Client:
    """Connect to a point, as anybody's client does.

    :raise NBDError: it cannot be reached.
    """
    from qmpblock.nbd import Client, tls_context

    foreign = parse_address(vm.nbd.address) if vm.nbd.address is not None else None
    return await Client.connect(
        UnixAddress(point.socket) if foreign is None else foreign,
        export=point.export,
        contexts=[CONTEXT],
        tls=tls_context(vm.nbd.tls_creds) if foreign and vm.nbd.tls_creds else None,
        tls_hostname=foreign.host if isinstance(foreign, TCPAddress) else None,
        stall=vm.stall,
    )


async def why_ended(vm: Connection, points: Mapping[DiskT, PointInTime]) -> Error | None:
    """Say which point has ended while it is still exported; None where all can be read.

    QEMU tells nobody but its readers, each by an error, and then for good: so a little is read.
    What was read before, with no error, was as it was at the instant.
    """
    for disk, point in points.items():
        try:
            async with await opened(vm, point) as client:
                least = min(max(_LITTLE, client.block_size.minimum), client.size)
                if least:  # a disk of no bytes has nothing to be read
                    await client.read(0, least)
        except (NBDError, StalledError) as error:
            return Error(
                f"the point in time of {disk.name} has ended: {error.message}",
                standing="what the guest overwrote could not be kept any more (its file was full, "
                f"or its storage failed or took longer than {PATIENCE} s); its writes went on. "
                "Reads have failed since then, so do not rely on what was made of them",
                remedy="give it more room: fleece=DIRECTORY, fleece_limit (--fleece, "
                "--fleece-limit)",
            )
    return None
