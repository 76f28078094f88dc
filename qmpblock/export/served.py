"""Served: read-only NBD exports inside QEMU for clients of others, whoever they are.

As `qmpblock.export.session`, whose clients are our own, it uses the VM's NBD server, of which there
is one, and its lock: meanwhile no other export of ours is made in this VM. What differs:

- the socket stays where it is, in a directory for this user alone, for whoever is to connect;
- nothing of the clients is in custody. So it is refused where one that goes away would end QEMU
  (K1), or two that read the same (K22);
- on leaving nobody is waited for: the exports are deleted `hard`, which closes every connection.

A controller that is killed leaves the exports and the server. They are undone as those of any
other (`qmpblock.export.server.undo_dead_run`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qmpblock.address import TCPAddress, UnixAddress, parse_address
from qmpblock.cancellation import undisturbed
from qmpblock.errors import UNTOUCHED, CommandError, DisconnectedError, UnsupportedError
from qmpblock.export.ownserver import NOTHING_LEFT, OwnServer
from qmpblock.export.server import delete_export, monitor_name, undo_dead_run
from qmpblock.graph.model import Device
from qmpblock.names import NBD_LOCK, export_name, new_run
from qmpblock.qemu import lock
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.connection import NBDAccess
from qmpblock.qemu.iothread import iothread_of
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.monitor import Monitor

__all__ = ["Served", "Serving", "check_served", "serving"]

_WAITING = 64  # connections that QEMU has not accepted yet


@dataclass(frozen=True)
class Served:
    """One export, and how it is reached.

    :ivar name: of the export.
    :ivar socket: the path of the UNIX socket; empty where it is a TCP port of a foreign server.
    :ivar uri: both, as NBD clients take them (`nbd+unix:///NAME?socket=PATH`).
    """

    name: str
    socket: str
    uri: str


async def check_served(monitor: Monitor, devices: Sequence[Device]) -> None:
    """Refuse what would endanger this QEMU, or cannot be; nothing is touched.

    :param devices: whose data is to be read.
    :raise UnsupportedError: says why, and what would do.
    """
    capabilities = Capabilities(monitor.version)
    if not monitor.can_pass_fds:
        raise UnsupportedError(
            f"an export for others needs the UNIX monitor of the VM, on its host, not "
            f"{monitor.address}",
            standing=UNTOUCHED,
            remedy="run qmpblock there",
        )
    if capabilities.overlapping_reads_of_views_abort:
        raise UnsupportedError(
            f"QEMU {capabilities} aborts where two clients read the same of a point in time",
            standing=UNTOUCHED,
            remedy="use QEMU 7.2.15, 8.2.8, 9.1.1, or 10.0, or newer ones of these",
        )
    if capabilities.nbd_clients_endanger_iothreads:
        iothreads = await monitor.execute("query-iothreads")
        for device in devices:
            if await iothread_of(monitor, device, iothreads) is not None:
                raise UnsupportedError(
                    f"{device.name} runs in an iothread, and QEMU {capabilities} aborts when an "
                    "NBD client of such a disk goes away, as anybody's may at any moment",
                    standing=UNTOUCHED,
                    remedy="use QEMU 10.0 or newer, or give the disk no iothread",
                )


@asynccontextmanager
async def serving(
    monitor: Monitor, count: int, *, access: NBDAccess, stall: float
) -> AsyncIterator[Serving]:
    """Have the VM's NBD server for exports of others' clients, before there is anything to export.

    `check_served` goes before. On leaving, by whatever way, all that was added to QEMU is removed
    again. Cancelling waits for that.

    :param count: how many exports there will be.
    :raise BusyError: a foreign NBD server runs in this VM, or another controller of ours uses it
        for the stall limit; on leaving: a client does not end its handshake (K14).
    :raise CommandError: QEMU refused; nothing of ours is left.
    """
    session = Serving(monitor, access, stall, count)
    try:
        try:
            await session.lock()
            await undisturbed(session.start())
        except CommandError as error:
            error.standing = NOTHING_LEFT
            raise
        yield session
    finally:
        await undisturbed(session.stop())


class Serving:
    """One use of the VM's NBD server: what it adds to QEMU, and how to remove it."""

    def __init__(self, monitor: Monitor, access: NBDAccess, stall: float, count: int) -> None:
        self._monitor = monitor
        self._access = access
        self._stall = stall
        self._run = new_run()
        self._names = [export_name(self._run, number) for number in range(count)]
        self._server = OwnServer(monitor, access, self._run, lasting=True)
        self._added: list[str] = []
        self._locked = False

    async def lock(self) -> None:
        """Keep other controllers away from the VM's NBD server. May be cancelled."""
        if self._access.address is None:
            self._server.choose_place()
        me = Holder.me(
            self._run,
            monitor=monitor_name(self._monitor),
            path=self._server.path,
            ports=[],
            custody=False,
            exports=self._names,
        )
        try:
            await lock.acquire(self._monitor, NBD_LOCK, me, self._undo, stall=self._stall)
        except BaseException:
            lock.abandon(self._run)
            raise
        self._locked = True

    async def _undo(self, dead: Holder) -> None:
        await undo_dead_run(self._monitor, dead, self._stall, NBD_LOCK)

    async def start(self) -> None:
        """Start the server, unless there is a foreign one."""
        if self._access.address is None:
            await self._server.start(_nobody_yet, _WAITING)

    @asynccontextmanager
    async def exports(self, nodes: Sequence[str]) -> AsyncIterator[list[Served]]:
        """Export nodes, read-only; on leaving nobody is connected any more, nor can be.

        :raise CommandError: QEMU refused an export.
        """
        try:
            await undisturbed(self._add(nodes))
            yield [_reached(name, self._access, self._server.path) for name in self._added]
        finally:
            await undisturbed(self._remove())

    async def _add(self, nodes: Sequence[str]) -> None:
        for name, node in zip(self._names, nodes, strict=True):
            self._added.append(name)  # as intent
            options = {"type": "nbd", "id": name, "name": name, "node-name": node}
            await self._monitor.execute("block-export-add", {**options, "writable": False})

    async def _remove(self) -> None:
        try:
            self._server.remove_folder()  # nobody is to come any more
            there = [await delete_export(self._monitor, one, self._stall) for one in self._added]
        except DisconnectedError:
            # QEMU has ended, with all of it; or whoever undoes the change undoes this, too.
            lock.abandon(self._run)
        else:
            if not all(there):  # somebody stopped our server, or it was never added
                self._server.doubt()

    async def stop(self) -> None:
        """Stop the server, and let others have it. Idempotent."""
        try:
            self._server.remove_folder()
            await self._server.check_ours()
            await self._server.stop()
            if self._locked:
                await lock.release(self._monitor, NBD_LOCK)
        except DisconnectedError:
            lock.abandon(self._run)
        except BaseException:
            lock.abandon(self._run)
            raise


async def _nobody_yet(_: object) -> None:
    """Make no connection of our own."""


def _reached(name: str, access: NBDAccess, path: str) -> Served:
    foreign = UnixAddress(path) if access.address is None else parse_address(access.address)
    tls = "s" if access.address is not None and access.tls_creds else ""
    if isinstance(foreign, TCPAddress):
        return Served(name, "", f"nbd{tls}://{str(foreign).removeprefix('tcp:')}/{quote(name)}")
    socket = str(Path(foreign.path).absolute())
    return Served(name, socket, f"nbd{tls}+unix:///{quote(name)}?socket={quote(socket)}")
