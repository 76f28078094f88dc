"""Connection: one running QEMU, its monitor and how its NBD server is reached; its graph, read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from qmpblock.address import MonitorAddress
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    DisconnectedError,
    Error,
    GraphError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.builder import Replies, build
from qmpblock.graph.model import BlockGraph
from qmpblock.managers import disks_called
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import is_ejected, no_command

__all__ = ["Connection", "NBDAccess"]

_ATTEMPTS = 5
#: What the graph is built from, by its name among the `Replies`.
_LOOK: Mapping[str, str | tuple[str, Mapping[str, object]]] = {
    "nodes": ("query-named-block-nodes", {"flat": True}),
    "debug_graph": "x-debug-query-block-graph",
    "block": "query-block",
    "stats": "query-blockstats",
    "jobs": "query-jobs",
    "exports": "query-block-exports",
}
_DISMISSAL = 10.0  # seconds for a foreign controller to dismiss a job that has ended


@dataclass(frozen=True)
class NBDAccess:
    """How this controller reaches an NBD server in the VM.

    :ivar address: of a foreign NBD server that already listens in this VM; None has us
        start our own.
    :ivar tls_creds: a directory laid out for QEMU's tls-creds-x509. Where we start a TCP
        server, QEMU must find the same directory on its host.
    :ivar insecure: allow NBD over TCP without TLS.
    """

    address: str | None = None
    tls_creds: str | None = None
    insecure: bool = False


class Connection:
    """One running QEMU, and how it is reached: what everything that is done to it needs.

    :ivar monitor: its QMP monitor; `nbd`: how an NBD server in it is reached.
    :ivar stall: seconds without progress that count as a failure.
    :ivar unmanaged: whether chains are changed also where a manager owns them.
    """

    def __init__(
        self, monitor: Monitor, nbd: NBDAccess, stall: float, *, unmanaged: bool = False
    ) -> None:
        self.monitor = monitor
        self.nbd = nbd
        self.stall = stall
        self.unmanaged = unmanaged

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        address: str | MonitorAddress,
        nbd: NBDAccess,
        *,
        unmanaged: bool = False,
        greeting_timeout: float = 5.0,
        stall: float = 60.0,
    ) -> AsyncIterator[Self]:
        """Connect; leaving disconnects. See `qmpblock.connect`."""
        monitor = await Monitor.connect(address, greeting_timeout=greeting_timeout, stall=stall)
        async with monitor:
            Capabilities(monitor.version).check_supported()
            await _check_is_vm(monitor)
            yield cls(monitor, nbd, stall, unmanaged=unmanaged)

    @property
    def capabilities(self) -> Capabilities:
        """What this QEMU can do."""
        return Capabilities(self.monitor.version)

    @asynccontextmanager
    async def unless_gone(self) -> AsyncIterator[None]:
        """Have what the body refuses be that QEMU has gone, where it has: that is why, then.

        Of a process that has ended nothing can be seen on the host, before its monitor is asked.

        :raise DisconnectedError: it has, and the body refused.
        """
        try:
            yield
        except UnsupportedError as error:
            try:
                await self.monitor.execute("query-status")
            except DisconnectedError as gone:
                gone.standing = error.standing
                raise gone from None
            raise

    async def graph(self) -> BlockGraph:
        """Read the block graph as it is now.

        :raise GraphError: it kept changing between the replies, or makes no sense.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return build(await self._replies())
            except GraphError:
                # Several replies, and QEMU may change the graph between two of them.
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def disks_called(self, graph: BlockGraph) -> Mapping[str, str]:
        """Return disks by what their manager calls them: libvirt's own words, if it lends the way.

        :raise DisconnectedError: the connection was lost.
        """
        return {**disks_called(graph.devices), **await self.monitor.disks_called()}

    async def _replies(self) -> Replies:
        if self.capabilities.concluded_streams_kill:
            await self._wait_for_dismissals()
        look = dict(_LOOK)
        try:
            answers = await self.monitor.read(*look.values())
        except CommandError as error:
            if error.command != look.pop("debug_graph"):
                raise _given_up(error) from None
            answers = await self.monitor.read(*look.values())  # unstable: a later QEMU may drop it
        told = dict(zip(look, answers, strict=True))
        if _in_fdset(told["nodes"]):
            told["fdsets"] = await self.monitor.execute("query-fdsets")
        return Replies(**told)

    async def _wait_for_dismissals(self) -> None:
        """Wait until no stream job is concluded: QEMU would crash (capabilities).

        Ours dismiss themselves there; whoever started another is about to dismiss it.

        :raise UnsupportedError: nobody does.
        """
        deadline = asyncio.get_running_loop().time() + _DISMISSAL
        while True:
            concluded = [
                job["id"]
                for job in await self.monitor.execute("query-jobs")
                if job["type"] == "stream" and job["status"] == "concluded"
            ]
            if not concluded:
                return
            if asyncio.get_running_loop().time() > deadline:
                name = printable(concluded[0])
                raise UnsupportedError(
                    f"the stream job {name} has ended and nobody dismisses it; QEMU "
                    f"{self.capabilities} would crash if we asked it for its block nodes",
                    standing=UNTOUCHED,
                    remedy=f'have it dismissed: job-dismiss {{"id": "{name}"}}',
                )
            await asyncio.sleep(0.05)


def _in_fdset(nodes: Any) -> bool:
    return isinstance(nodes, list) and any(
        isinstance(node, dict) and str(node.get("file")).startswith("/dev/fdset/") for node in nodes
    )


async def _check_is_vm(monitor: Monitor) -> None:
    """Refuse a storage daemon, whose monitor greets as a QEMU's does.

    :raise UnsupportedError: it is one.
    """
    try:
        await monitor.execute("query-status")
    except CommandError as error:
        if not no_command(error):
            raise
        raise UnsupportedError(
            f"what answers at {monitor.address} is no VM but a storage daemon "
            f"(qemu-storage-daemon {Capabilities(monitor.version)}): it has no guest and no disks, "
            "only nodes and exports, which others use",
            standing=UNTOUCHED,
            remedy="give the monitor of the VM that uses its images. A disk that the daemon serves "
            "by vhost-user is not that VM's QEMU's to change either",
        ) from None


def _given_up(error: CommandError) -> Error:
    """Say what it means that QEMU does not describe its nodes: one of them has no driver.

    That is so where it found an image corrupt while the guest used it (qcow2): from then on its
    I/O fails, and QEMU says "Block device NODE is ejected" of it.
    """
    if not is_ejected(error):
        return error
    return UnsupportedError(
        "QEMU found an image corrupt while the guest used it, and gave it up: "
        f"{printable(error.description)}",
        standing="nothing was touched; the guest's I/O on that disk fails",
        remedy="end the VM, save the image, then: qemu-img check -r all IMAGE",
    )
