"""VM: a connection to one running QEMU, and the disks it has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qmpblock.address import Address
from qmpblock.capabilities import Capabilities
from qmpblock.disk import Disk
from qmpblock.errors import CommandError, GraphError
from qmpblock.export import NBDAccess
from qmpblock.graph import BlockGraph, Replies
from qmpblock.monitor import Monitor

__all__ = ["VM", "connect"]

_ATTEMPTS = 5


@asynccontextmanager
async def connect(
    address: str | Address,
    *,
    nbd: str | None = None,
    tls_creds: str | None = None,
    insecure: bool = False,
    greeting_timeout: float = 5.0,
    stall: float = 60.0,
) -> AsyncIterator[VM]:
    """Connect to a running QEMU; leaving disconnects, and changes nothing in it.

    :param address: of its QMP monitor: a UNIX socket path or HOST:PORT.
    :param nbd: address of a foreign NBD server that already listens in this VM.
    :param tls_creds: directory of TLS credentials for NBD over TCP (QEMU's x509 layout).
    :param insecure: allow NBD over TCP without TLS.
    :param greeting_timeout: seconds for the monitor's greeting.
    :param stall: seconds without progress that count as a failure.
    :raise MonitorError: the monitor cannot be reached or used.
    :raise UnsupportedError: QEMU older than 7.2.
    """
    monitor = await Monitor.connect(address, greeting_timeout=greeting_timeout, stall=stall)
    async with monitor:
        Capabilities(monitor.version).check_supported()
        yield VM(monitor, NBDAccess(nbd, tls_creds, insecure), stall)


class VM:
    """One running QEMU. Get it from `connect`."""

    def __init__(self, monitor: Monitor, nbd: NBDAccess, stall: float) -> None:
        self.monitor = monitor
        self.nbd = nbd
        self.stall = stall

    @property
    def capabilities(self) -> Capabilities:
        """What this QEMU can do."""
        return Capabilities(self.monitor.version)

    async def graph(self) -> BlockGraph:
        """Read the block graph as it is now.

        :raise GraphError: it kept changing between the replies, or makes no sense.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return BlockGraph.from_replies(await self._replies())
            except GraphError:
                # Several replies, and QEMU may change the graph between two of them.
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def _replies(self) -> Replies:
        execute = self.monitor.execute
        nodes = await execute("query-named-block-nodes", {"flat": True})
        try:
            debug = await execute("x-debug-query-block-graph")
        except CommandError:
            debug = None  # an unstable command: a later QEMU may drop it
        return Replies(
            block=await execute("query-block"),
            nodes=nodes,
            stats=await execute("query-blockstats"),
            jobs=await execute("query-jobs"),
            exports=await execute("query-block-exports"),
            debug_graph=debug,
        )

    async def disks(self) -> list[Disk]:
        """Return every guest device that has a disk in it."""
        graph = await self.graph()
        return [Disk(self, device) for device in graph.devices if device.chain is not None]

    async def disk(self, name: str) -> Disk:
        """Find a disk by qdev id, QOM path, drive id, node name or active image file.

        :raise NotFoundError: there is none; the error lists those that there are.
        :raise AmbiguousError: more than one goes by that name.
        """
        return Disk(self, (await self.graph()).device(name))
