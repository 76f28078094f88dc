"""VM: a connection to one running QEMU, and the disks it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from qmpblock.address import Address
from qmpblock.errors import (
    CommandError,
    Error,
    GraphError,
    MonitorHeldError,
    NotFoundError,
    UnsupportedError,
    printable,
)
from qmpblock.export.session import NBDAccess
from qmpblock.graph.model import BlockGraph, Job, Replies
from qmpblock.mapping import Disk
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.elsewhere import check_served_here
from qmpblock.qemu.monitor import Monitor

if TYPE_CHECKING:
    import os

    from qmpblock.chains.snapshot import SnapshotResult
    from qmpblock.changes.unfinished import Step
    from qmpblock.recovery import Recovery

__all__ = ["VM", "connect"]

_ATTEMPTS = 5
_DISMISSAL = 10.0  # seconds for a foreign controller to dismiss a job that has ended


@asynccontextmanager
async def connect(
    address: str | Address,
    *,
    nbd: str | None = None,
    tls_creds: str | None = None,
    insecure: bool = False,
    unmanaged: bool = False,
    greeting_timeout: float = 5.0,
    stall: float = 60.0,
) -> AsyncIterator[VM]:
    """Connect to a running QEMU; leaving disconnects, and changes nothing in it.

    :param address: of its QMP monitor: a UNIX socket path or HOST:PORT.
    :param nbd: address of a foreign NBD server that already listens in this VM.
    :param tls_creds: directory of TLS credentials for NBD over TCP (QEMU's x509 layout).
    :param insecure: allow NBD over TCP without TLS.
    :param unmanaged: change chains also where libvirt or another manager owns them, and will not
        know of it (docs/safety.md).
    :param greeting_timeout: seconds for the monitor's greeting.
    :param stall: seconds without progress that count as a failure.
    :raise MonitorError: the monitor cannot be reached or used; a MonitorHeldError says which
        process holds it, and what it is about where it is one of ours.
    :raise UnsupportedError: QEMU older than 7.2.
    """
    try:
        monitor = await Monitor.connect(address, greeting_timeout=greeting_timeout, stall=stall)
    except MonitorHeldError as error:
        from qmpblock.changes.held import tell_of_our_own

        tell_of_our_own(error, address)
        raise
    async with monitor:
        Capabilities(monitor.version).check_supported()
        await _check_is_vm(monitor)
        yield VM(monitor, NBDAccess(nbd, tls_creds, insecure), stall, unmanaged=unmanaged)


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
        if error.error_class != "CommandNotFound":
            raise
        raise UnsupportedError(
            f"what answers at {monitor.address} is no VM but a storage daemon "
            f"(qemu-storage-daemon {Capabilities(monitor.version)}): it has no guest and no disks, "
            "only nodes and exports, which others use",
            standing="nothing was touched",
            remedy="give the monitor of the VM that uses its images. A disk that the daemon serves "
            "by vhost-user is not that VM's QEMU's to change either",
        ) from None


class VM:
    """One running QEMU. Get it from `connect`."""

    def __init__(
        self, monitor: Monitor, nbd: NBDAccess, stall: float, *, unmanaged: bool = False
    ) -> None:
        self.monitor = monitor
        self.nbd = nbd
        self.stall = stall
        self.unmanaged = unmanaged

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
        if self.capabilities.concluded_streams_kill:
            await self._wait_for_dismissals()
        try:
            nodes = await execute("query-named-block-nodes", {"flat": True})
        except CommandError as error:
            raise _given_up(error) from None
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
            fdsets=await execute("query-fdsets") if _in_fdset(nodes) else [],
        )

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
                    standing="nothing was touched",
                    remedy=f'have it dismissed: job-dismiss {{"id": "{name}"}}',
                )
            await asyncio.sleep(0.05)

    async def disks(self) -> list[Disk]:
        """Return every guest device that has a disk in it."""
        graph = await self.graph()
        return [Disk(self, device) for device in graph.devices if device.chain is not None]

    async def disk(self, name: str) -> Disk:
        """Find a disk by qdev id, QOM path, drive id, node name or active image file.

        :raise NotFoundError: there is none; the error lists those that there are.
        :raise UnsupportedError: another process serves it (vhost-user).
        :raise AmbiguousError: more than one goes by that name.
        """
        try:
            return Disk(self, (await self.graph()).device(name))
        except NotFoundError:
            await check_served_here(self.monitor, name)
            raise

    async def jobs(self) -> tuple[Job, ...]:
        """Return every background job, of whomever; `job.ours` says whose it is."""
        return (await self.graph()).jobs

    async def snapshot(
        self,
        overlays: Mapping[Disk, str | os.PathLike[str]],
        *,
        format: str = "qcow2",  # noqa: A002 - the command's word
        backing_name: Literal["relative", "absolute"] = "relative",
    ) -> SnapshotResult:
        """Freeze the active layers of several disks at one point in time.

        Each disk's writes go to its overlay from then on, a new file which is named here and
        made by QEMU, with the disk's encryption if it has one. Dirty bitmaps that record in
        the active layer go on, under the same names, in the overlay. All or none; cancelled
        or failed, nothing is left.

        :param overlays: for each disk the path of its overlay; relative ones count from the
            current directory.
        :param format: of the overlays: qcow2 or qed.
        :param backing_name: how an overlay records the image below: relative to its own
            directory, or absolute.
        :raise RequestError: a file is there already, or it is not possible; nothing was touched.
        :raise BusyError: a job, or another controller, is at work on one of the disks.
        """
        from qmpblock.chains.snapshot import snapshot

        return await snapshot(self, overlays, format=format, backing_name=backing_name)

    async def recover(
        self,
        *,
        carry_on: bool = False,
        dry_run: bool = False,
        tell: Callable[[str, Step], None] | None = None,
    ) -> list[Recovery]:
        """Undo, or carry on, what controllers that died left in this VM. Idempotent.

        A pivot that waits to be finalized is finished before anything else: it holds the
        guest's I/O. What living controllers do is never touched, only listed.

        :param carry_on: follow jobs to their end instead of cancelling them.
        :param dry_run: only say what is to be done.
        :param tell: is called before each step, with what it belongs to.
        :raise BusyError: of some controller it cannot be told whether it lives; all else is
            recovered.
        """
        from qmpblock.changes.unfinished import Choice
        from qmpblock.recovery import recover

        choice = Choice.CONTINUE if carry_on else Choice.UNDO
        return await recover(self, choice, dry_run=dry_run, tell=tell)


def _given_up(error: CommandError) -> Error:
    """Say what it means that QEMU does not describe its nodes: one of them has no driver.

    That is so where it found an image corrupt while the guest used it (qcow2): from then on its
    I/O fails, and QEMU says "Block device NODE is ejected" of it.
    """
    if "is ejected" not in error.description:
        return error
    return UnsupportedError(
        "QEMU found an image corrupt while the guest used it, and gave it up: "
        f"{printable(error.description)}",
        standing="nothing was touched; the guest's I/O on that disk fails",
        remedy="end the VM, save the image, then: qemu-img check -r all IMAGE",
    )
