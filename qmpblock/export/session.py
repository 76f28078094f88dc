"""Export: NBD exports of nodes inside QEMU, entered and left safely.

They are read-only, but where a new image is written that QEMU does not use yet.

Three defects of QEMU 7.2 make this hard:

- K1: when an NBD client of a node in an iothread goes away, QEMU aborts. So our
  end of the connection must never go away before the export does, not even when this process
  is killed. It cannot, because QEMU itself holds a duplicate of it ("custody").
- nbd-server-stop waits for ever, and the guest with it, while a client is connected whose
  handshake is not complete (measured on 7.2.22; 11.1 does not). So such a connection, which
  is in no iothread yet, is closed first, QEMU's duplicate included.

The order::

    entering                                     leaving
    1. lock (an object in QEMU)                  1. block-export-del mode=hard, each
    2. listen on a socket of ours, connect       2. blockdev-del of what we added (K4)
    3. getfd: the client's ends                  3. close and closefd the client's ends
    4. getfd: the listening socket               4. nbd-server-stop, if the server is ours
    5. nbd-server-start on it, unlink its path   5. unlock
    6. block-export-add, each
    7. NBD handshake

The listening socket is handed over too, so QEMU needs no path that it could not reach. A VM
has one NBD server. Where a foreign one runs, the caller must know its address (`NBDAccess`),
and it is only connected to; custody is then taken only where K1 is a danger, because what a
killed controller leaves half-connected would hang whoever stops that server.

A controller that is killed leaves all this behind, and the lock tells the next one what to
undo. Nothing here depends on the guest: the exports survive its reset, the unplugging of
its disk, and any job on the chain.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.address import Address, SSHAddress, TCPAddress, parse_address
from qmpblock.cancellation import undisturbed
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    DisconnectedError,
    NBDConnectError,
    UnsupportedError,
    printable,
)
from qmpblock.export.ownserver import NOTHING_LEFT, OwnServer
from qmpblock.export.server import (
    delete_export,
    monitor_name,
    undo_dead_run,
)
from qmpblock.graph.model import Device
from qmpblock.names import (
    NBD_LOCK,
    export_name,
    holder_node,
    joint_nodes,
    new_run,
    prefix_of_run,
)
from qmpblock.qemu import lock, ownership
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.connection import NBDAccess
from qmpblock.qemu.iothread import iothread_of
from qmpblock.qemu.joint import Joint
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.polling import unpolled
from qmpblock.qemu.refusals import (
    iothread_is_fixed,
    no_node,
    not_found,
    tolerate,
)
from qmpblock.sockets import open_socket

if TYPE_CHECKING:
    from qmpblock.nbd import Client

__all__ = ["Request", "check_access", "clear_dead", "exports", "no_exports"]

_TRIES = 16  # to add an export where the guest is about to drive its disk
_BOOTING = 1.0  # seconds to wait for a guest that is about to drive its disk
_HANDSHAKE = (
    10.0  # seconds after which QEMU hangs up, from 7.2.14 on, where it can be told no other
)


@dataclass(frozen=True)
class Request:
    """One export to make.

    :ivar node: the node to export.
    :ivar contexts: NBD metadata contexts that the client will ask for.
    :ivar hold_writer: whether NBD_CMD_CACHE will be used on a node with a data file: QEMU
        aborts where no writer is attached (K4), and an unplug can make it so; a node of
        ours then holds the write permission.
    :ivar in_flight: requests that the client may have in flight.
    :ivar writable: whether the client may write; only to a node of ours that nothing uses yet.
    :ivar bitmap: a dirty bitmap of the node's that does not record now: its context is asked for,
        too, as the last one.
    """

    node: str
    contexts: tuple[str, ...] = ("base:allocation", "qemu:allocation-depth")
    hold_writer: bool = False
    in_flight: int = 16
    writable: bool = False
    bitmap: str = ""

    @property
    def every_context(self) -> tuple[str, ...]:
        """Return what the client asks for."""
        dirty = (f"qemu:dirty-bitmap:{self.bitmap}",) if self.bitmap else ()
        return (*self.contexts, *dirty)


async def check_access(monitor: Monitor, access: NBDAccess, device: Device | None = None) -> None:
    """Refuse what this QEMU or this transport cannot do safely; nothing is touched.

    :param device: whose nodes are to be exported; None where no device uses them.
    :raise UnsupportedError: says why, and what would do.
    """
    await _Session(monitor, access, 0).check(device)


@asynccontextmanager
async def exports(
    monitor: Monitor,
    device: Device | None,
    requests: Sequence[Request],
    *,
    access: NBDAccess | None = None,
    stall: float = 60.0,
    held: bool = False,
) -> AsyncIterator[list[Client]]:
    """Export nodes of one device's graph, and yield a connected NBD client for each.

    Without a device: nodes that none uses.

    On leaving, by whatever way, all that was added to QEMU is removed again. Cancelling
    waits for that; it takes milliseconds.

    :param held: whether QEMU refuses to migrate meanwhile (`qmpblock.changes.nomigration`), and
        whose the images are was asked since: then that is asked once more only, at the last moment.
    :raise UnsupportedError: not safe, or not possible, over this monitor; or the images are not
        this QEMU's (`qmpblock.qemu.ownership`).
    :raise BusyError: a foreign NBD server listens in this VM, or another controller of
        ours does not let go.
    :raise CommandError: QEMU refused an export.
    :raise NBDError: the connection failed.
    """
    clock = asyncio.get_running_loop().time
    began = clock()
    async with AsyncExitStack() as stack:
        while True:
            tried = clock()
            try:
                session = _Session(monitor, access or NBDAccess(), stall, held=held)
                entering = _exports(session, device, requests)
                clients = await stack.enter_async_context(entering)
                break
            except _LateError:  # this process was stopped, or the host too busy for it
                if tried - began >= stall:
                    raise
        yield clients


@asynccontextmanager
async def _exports(
    session: _Session, device: Device | None, requests: Sequence[Request]
) -> AsyncIterator[list[Client]]:
    """Do what `exports` does, once.

    :raise _LateError: it could do so again.
    """
    await session.check(device)
    async with unpolled(session.monitor, session.iothreads):
        try:
            try:
                await session.reach(requests)
                await session.lock()
                await undisturbed(session.enter())
                clients = [await session.connect(slot) for slot in session.slots]
            except CommandError as error:
                if error.standing is None:
                    error.standing = NOTHING_LEFT
                raise
            yield clients
        finally:
            await undisturbed(session.leave())


@asynccontextmanager
async def no_exports(monitor: Monitor, *, stall: float) -> AsyncIterator[None]:
    """Keep all controllers of ours from exporting anything in the VM, for as long as this lasts.

    :param stall: seconds to wait for one that does.
    :raise BusyError: it did not end.
    """

    async def undo(dead: Holder) -> None:
        await undo_dead_run(monitor, dead, stall, NBD_LOCK)

    run = secrets.token_hex(4)
    me = Holder.me(run, monitor=monitor_name(monitor), path="", ports=[], custody=False, exports=[])
    try:
        await lock.acquire(monitor, NBD_LOCK, me, undo, stall=stall)
    except BaseException:
        lock.abandon(run)
        raise
    try:
        yield
    finally:
        try:
            await undisturbed(lock.release(monitor, NBD_LOCK))
        except DisconnectedError:
            lock.abandon(run)


async def clear_dead(monitor: Monitor, *, stall: float) -> None:
    """Undo what a controller that died left of the VM's NBD server. Idempotent.

    :param stall: seconds to wait for another controller that is doing so.
    :raise BusyError: it does not end, or that takes the monitor which the dead one used.
    """
    holder = await lock.read(monitor, NBD_LOCK)
    if isinstance(holder, Holder) and holder.is_dead():
        async with no_exports(monitor, stall=stall):
            pass  # to have taken the lock is to have undone it


class _LateError(NBDConnectError):
    """QEMU has hung up, since the handshake came too late."""


@dataclass
class _Slot:
    """One export and the socket of its client."""

    request: Request
    name: str
    sock: socket.socket | None = None
    in_custody: bool = False
    exported: bool = False
    holder: bool = False
    client: Client | None = None

    async def close(self) -> None:
        """Close our end of the connection. Idempotent."""
        if self.client is not None:
            await self.client.close()
        elif self.sock is not None:
            self.sock.close()


class _Session:
    """All that one use of `exports` adds to QEMU, and how to remove it."""

    def __init__(
        self, monitor: Monitor, access: NBDAccess, stall: float, *, held: bool = False
    ) -> None:
        self.monitor = monitor
        self.access = access
        self.stall = stall
        self.held = held
        self.run = new_run()
        self.slots: list[_Slot] = []
        self.server = OwnServer(monitor, access, self.run)
        self.custody = monitor.can_pass_fds
        self.iothreads: list[dict[str, Any]] | None = None  # where that had to be asked
        self.iothread: str | None = None
        self.devices: tuple[Device, ...] = ()
        self.locked = False
        self.device: Device | None = None
        self.reached = 0.0  # when the first connection was made, or could be

    # before anything is touched

    async def check(self, device: Device | None) -> None:
        """Refuse what this QEMU or this transport cannot do safely."""
        self.devices = () if device is None else (device,)
        if not self.held:
            await ownership.ask(self.monitor, self.devices)
        address = self.monitor.address
        self.device = device
        capabilities = Capabilities(self.monitor.version)
        if device is not None and capabilities.nbd_clients_endanger_iothreads:
            self.iothreads = await self.monitor.execute("query-iothreads")
            self.iothread = await iothread_of(self.monitor, device, self.iothreads)
        if self.monitor.can_pass_fds:
            # On a foreign server custody is a danger of its own; see above.
            self.custody = self.access.address is None or self.iothread is not None
            return
        if device is not None and self.iothread is not None:
            raise UnsupportedError(
                f"{device.name} runs in an iothread, and QEMU {capabilities} aborts when an NBD "
                "client of such a disk goes away; only a UNIX monitor can prevent it",
                standing=UNTOUCHED,
                remedy="use a UNIX socket monitor (-qmp unix:PATH,server=on,wait=off) on the "
                "VM's host, or QEMU 10.0 or newer",
            )
        if isinstance(address, SSHAddress):
            return  # what goes by ssh is encrypted, and its peer proven
        if not self.access.address and not self.server.over_tcp and not address.loopback:
            raise UnsupportedError(
                f"the monitor {address} is on another host, and this needs an NBD connection "
                "to it, which would be neither encrypted nor authenticated",
                standing=UNTOUCHED,
                remedy="give --tls-creds DIR, or --nbd ADDRESS of a server of your own, or "
                "--insecure on a network that you trust; or run qmpblock on the VM's host",
            )

    # entering

    async def reach(self, requests: Sequence[Request]) -> None:
        """Connect to the foreign server, if that is the way. May be cancelled."""
        self.slots = [_Slot(r, export_name(self.run, i)) for i, r in enumerate(requests)]
        if self.access.address is None:
            return
        self.reached = asyncio.get_running_loop().time()
        for slot in self.slots:
            try:
                async with asyncio.timeout(self.stall):
                    slot.sock = await open_socket(parse_address(self.access.address))
            except TimeoutError:
                raise _no_server(self.access.address, f"no answer in {self.stall:g} s") from None
            except OSError as error:
                raise _no_server(self.access.address, error.strerror or str(error)) from None

    async def enter(self) -> None:
        """Do all that must not be interrupted half-way."""
        if self.access.address is None:
            self.reached = asyncio.get_running_loop().time()
            await self.server.start(self._hand_over, len(self.slots))
        elif self.custody:
            for slot in self.slots:
                await self._take_custody(slot)
        for slot in self.slots:
            await self._add_export(slot)

    async def lock(self) -> None:
        """Keep other controllers away from the VM's NBD server. May be cancelled."""
        if self.access.address is None:
            self.server.choose_place()
        me = Holder.me(
            self.run,
            monitor=monitor_name(self.monitor),
            path=self.server.path,
            ports=self.server.ports,
            custody=self.custody,
            exports=[slot.name for slot in self.slots],
        )
        try:
            await lock.acquire(self.monitor, NBD_LOCK, me, self._undo, stall=self.stall)
        except BaseException:
            lock.abandon(self.run)  # should it be held after all, whoever comes next may break it
            raise
        self.locked = True

    async def _undo(self, dead: Holder) -> None:
        await undo_dead_run(self.monitor, dead, self.stall, NBD_LOCK)

    async def _hand_over(self, where: Address) -> None:
        """Connect to the listening socket of our own server, before QEMU has that."""
        for slot in self.slots:
            slot.sock = await open_socket(where)
            await self._take_custody(slot)

    async def _take_custody(self, slot: _Slot) -> None:
        assert slot.sock is not None
        slot.in_custody = True  # as intent: leave() copes with a name that is not there
        await self.monitor.pass_fd(slot.name, slot.sock.fileno())

    async def _add_export(self, slot: _Slot) -> None:
        # Now at the latest: an export activates images that are another QEMU's.
        await ownership.ask(self.monitor, self.devices, standing=NOTHING_LEFT)
        if slot.request.hold_writer:
            slot.holder = True
            assert self.device is not None  # check() went before
            chain = self.device.chain
            holder, name, _ = _holder(slot)
            joint = Joint(self.monitor, name)
            await joint.add(chain.active.size if chain is not None else 0)
            node = {"driver": "copy-on-read", "node-name": holder, "file": name}
            await self.monitor.execute("blockdev-add", node)
            await joint.put_on(slot.request.node, self.device)
        options: dict[str, object] = {
            "type": "nbd",
            "id": slot.name,
            "name": slot.name,
            "node-name": slot.request.node,
            "writable": slot.request.writable,
            "allocation-depth": True,
        }
        if slot.request.bitmap:
            options["bitmaps"] = [slot.request.bitmap]
        slot.exported = True
        try:
            if self.iothread is None:
                await self.monitor.execute("block-export-add", options)
            else:
                await self._add_pinned(options)
        except (CommandError, UnsupportedError):
            slot.exported = False
            raise

    async def _add_pinned(self, options: dict[str, object]) -> None:
        """Add an export that keeps its node in the iothread where the guest drives it."""
        pinned = {**options, "iothread": self.iothread, "fixed-iothread": True}
        for attempt in range(_TRIES):
            try:
                await self.monitor.execute("block-export-add", pinned)
            except CommandError as error:
                if not iothread_is_fixed(error):
                    raise
            else:
                return
            if not (await self.monitor.execute("query-status"))["running"]:
                # A paused guest resets nothing, and going on moves the node only once.
                await self.monitor.execute("block-export-add", options)
                return
            if attempt + 1 < _TRIES:
                await asyncio.sleep(_BOOTING / _TRIES)
        raise UnsupportedError(
            f"the disk is to run in the iothread {printable(self.iothread)}, but the guest does "
            f"not drive it: it boots or resets, or has no driver. QEMU "
            f"{Capabilities(self.monitor.version)} may abort when a guest begins to drive a disk "
            "that has an NBD client",
            standing=NOTHING_LEFT,
            remedy="try again when the guest uses the disk, or while the VM is paused; or use "
            "QEMU 10.0 or newer",
        )

    async def connect(self, slot: _Slot) -> Client:
        """Negotiate on the slot's connection. May be cancelled."""
        from qmpblock.nbd import Client, tls_context

        target = slot.sock if slot.sock is not None else self.server.where
        assert target is not None  # enter() went through
        tls, host = None, None
        if self.access.tls_creds and (self.access.address or self.server.over_tcp):
            tls = tls_context(self.access.tls_creds)
            reached = (
                parse_address(self.access.address) if self.access.address else self.server.where
            )
            host = reached.host if isinstance(reached, TCPAddress) else None
        try:
            slot.client = await Client.connect(
                target,
                export=slot.name,
                contexts=slot.request.every_context,
                in_flight=slot.request.in_flight,
                tls=tls,
                tls_hostname=host,
                # Without custody an ordinary good-bye is right; under it, it would be K1.
                polite=not slot.in_custody,
                stall=self.stall,
            )
        except NBDConnectError as error:
            late = asyncio.get_running_loop().time() - self.reached
            if late < _HANDSHAKE:
                raise
            raise _LateError(
                f"{error.message}, {late:.0f} s after it was made: QEMU waits for {_HANDSHAKE:g} s",
                standing=NOTHING_LEFT,
                remedy="try again when this host is less busy",
            ) from error
        return slot.client

    # leaving

    async def leave(self) -> None:
        """Remove all that was added, as far as it was."""
        try:
            await self._remove_exports()
            for slot in self.slots:
                await self._end_connection(slot)
            await self.server.stop()
            if self.locked:
                await lock.release(self.monitor, NBD_LOCK)
        except DisconnectedError:
            # With QEMU itself gone (powered off, quit, killed), so is all that was to be
            # removed. If only this connection was cut, the next controller removes it, and
            # that may be this very process.
            lock.abandon(self.run)
            if self.locked and self._qemu_is_there():
                raise DisconnectedError(
                    f"the connection to {self.monitor.address} was lost before all that was "
                    "added to the VM was removed",
                    standing=f"left in it: the lock {NBD_LOCK}, exports named "
                    f"{prefix_of_run(self.run)}...",
                    remedy="run any map of this VM: it removes them first",
                ) from None
        except BaseException:
            lock.abandon(self.run)
            raise
        finally:
            for slot in self.slots:
                await slot.close()
            self.server.remove_folder()

    def _qemu_is_there(self) -> bool:
        pid = self.monitor.peer_pid
        return pid is not None and Path(f"/proc/{pid}/fd").exists()

    async def _remove_exports(self) -> None:
        lost = False
        for slot in self.slots:
            if slot.exported:
                lost |= not await delete_export(self.monitor, slot.name, self.stall)
            for node in _holder(slot) if slot.holder else ():
                await tolerate(
                    no_node,
                    self.monitor.execute("blockdev-del", {"node-name": node}),
                )
        # An export that went away by itself means that somebody stopped our server, and may
        # have started one of their own since.
        if lost:
            self.server.doubt()
        await self.server.check_ours()

    async def _end_connection(self, slot: _Slot) -> None:
        await slot.close()
        if slot.in_custody:
            await tolerate(not_found, self.monitor.execute("closefd", {"fdname": slot.name}))


def _holder(slot: _Slot) -> tuple[str, ...]:
    """Return the names of the nodes that hold the write permission, each before what it is over."""
    holder, joint = holder_node(slot.name)
    return holder, *joint_nodes(joint)


def _no_server(address: str, why: str) -> NBDConnectError:
    return NBDConnectError(
        f"no NBD server answers at {printable(address)}: {why}",
        standing=UNTOUCHED,
        remedy="look whether --nbd names the server that runs in this VM",
    )
