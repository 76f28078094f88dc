"""Landing: what is done to a migration's destination, which waits for the guest (-incoming defer).

Its images are written to through exports of its own NBD server, which are gone before the guest is
handed over: an NBD client that goes away after that, or that is in an iothread before, makes QEMU
7.2 abort (K1). So exports end by `block-export-del` with mode hard, before anything at the
source closes a connection; the server itself is stopped when the guest runs. Or a storage daemon
serves them (`qmpblock.migration.imageserver`), which has ended by then.

One on another host is reached by ssh (`qmpblock.host.forward`), and so are its exports and where it
waits for the guest: sockets that its QEMU makes beside its monitor.

Nothing else of ours looks into the destination meanwhile: its disks are locked like the source's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.address import Address, UnixAddress
from qmpblock.changes.copies import Migration
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import OWN_REMEDY, undo_dead_change
from qmpblock.copying.relay import place_for
from qmpblock.copying.target import NBDTarget, credentials_object
from qmpblock.copying.wire import user_of
from qmpblock.errors import CommandError, Error, MonitorError, StalledError, printable
from qmpblock.export.ownserver import OwnServer
from qmpblock.export.server import delete_exports, delete_object, monitor_name, undo_dead_run
from qmpblock.host.socketfolder import SocketFolder
from qmpblock.migration import wayback
from qmpblock.migration.contents import ALLOCATION, DEPTH, make_ready
from qmpblock.migration.imagedaemon import ImageDaemon
from qmpblock.names import (
    NBD_LOCK,
    arrival_wire,
    export_name,
    lock_names,
    stream_socket,
    stream_wire,
    wire_credentials,
)
from qmpblock.nbd import Client
from qmpblock.qemu import lock
from qmpblock.qemu.connection import NBDAccess
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.refusals import not_found, tolerate
from qmpblock.qemu.runstate import STANDS
from qmpblock.sockets import open_socket

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.host.forward import Forward
    from qmpblock.migration.look import Pair
    from qmpblock.migration.over import Over
    from qmpblock.migration.settings import Preset
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.monitor import Event

__all__ = ["Landing"]

_ANSWER = 2.0  # seconds for a word from a QEMU that is well
_POLL = 0.002  # seconds between looks, while the guest stands

_log = logging.getLogger(__name__)


class Landing:
    """The destination of one migration. `lock`, `serve`, ..., then `leave`, or `give_up`.

    :param has_ended: tells by its process, where that can be seen.
    :param images: what serves its disks; None: it does so itself.
    :param preset: what it is told before it waits for the guest; None: nothing.
    :ivar spoilt: whether it was sent anything: it is of no use for another attempt then.
    """

    def __init__(
        self,
        vm: Connection,
        run: str,
        disks: Sequence[DiskDevice],
        has_ended: Callable[[], bool],
        images: ImageDaemon | None = None,
        over: Over | None = None,
        preset: Preset | None = None,
    ) -> None:
        self.vm = vm
        self.spoilt = False
        self._ended = False
        self._run = run
        self._disks = disks
        self._has_ended = has_ended
        self._images = images
        self._locks: list[str] = []
        self._over = over
        self._credentials = wire_credentials(stream_wire(run))
        self._had: str | None = None  # its parameter tls-creds, once it has ours
        self._armed = False
        self._preset = preset
        self._folder = SocketFolder(arrival_wire(run))
        self._server = OwnServer(
            vm.monitor,
            NBDAccess(),
            run,
            lasting=True,
            at=None if over is None else over.disks,
            credentials=None if over is None or over.there is None else self._credentials,
        )
        self._serves = False
        self._exports: list[str] = []
        self._readers: list[Client] = []

    # -- before

    async def lock(self, *, serving: int, nodes: Sequence[str] = ()) -> None:
        """Keep all else of ours away. Cancelling leaves the locks to `leave`.

        :param serving: how many exports there will be.
        :param nodes: that are made there meanwhile, and go when it is left.
        :raise BusyError: another controller is at work there.
        """
        monitor = self.vm.monitor
        record = Migration(
            run=self._run,
            vm=await identify(self.vm),
            devices=tuple(disk.qom_path for disk in self._disks),
            names=tuple(disk.name for disk in self._disks),
            locks=lock_names(self._disks),
            nodes=tuple(nodes),
            wires=((stream_wire(self._run), ""),) if self._secured else (),
        )
        me = Holder.me(self._run, record=record.as_json())

        async def undo(dead: Holder) -> None:
            await undo_dead_change(self.vm, dead)

        async def undo_server(dead: Holder) -> None:
            await undo_dead_run(monitor, dead, self.vm.stall, NBD_LOCK)

        if serving and self._images is None:  # first: a dead one's exports go before its nodes
            self._server.choose_place()
            user = Holder.me(
                self._run,
                monitor=monitor_name(monitor),
                path=self._server.path,
                ports=[],
                custody=True,
                exports=[export_name(self._run, number) for number in range(serving)],
            )
            await lock.acquire(monitor, NBD_LOCK, user, undo_server, stall=self.vm.stall)
            self._locks.append(NBD_LOCK)
        await lock.acquire_all(monitor, record.locks, me, undo, stall=0, remedy=OWN_REMEDY)
        self._locks += record.locks

    async def serve(self, pairs: Sequence[Pair]) -> list[NBDTarget]:
        """Export the disks for writing; return where each is found. Not to be cancelled half-way.

        :raise BusyError: another NBD server runs there.
        :raise CommandError: QEMU refused.
        :raise ToolError: the storage daemon did not start: its words.
        """
        if self._images is not None:
            await self._images.start()
            return self._images.targets
        return await self.serve_nodes([pair.destination.chain.active.node.name for pair in pairs])

    async def serve_nodes(self, nodes: Sequence[str]) -> list[NBDTarget]:
        """Export nodes for writing, likewise; by its own server."""
        await self._arm()
        self._serves = True
        await self._server.start(_nobody, len(nodes))
        self._exports = [export_name(self._run, number) for number, _ in enumerate(nodes)]
        added = (
            (
                "block-export-add",
                {
                    "type": "nbd",
                    "id": name,
                    "name": name,
                    "node-name": node,
                    "writable": True,
                    "allocation-depth": True,
                },
            )
            for name, node in zip(self._exports, nodes, strict=True)
        )
        for said in await self.vm.monitor.each(*added):
            if isinstance(said, CommandError):
                raise said
        where, over = self._server.where or UnixAddress(self._server.path), self._over
        return [
            NBDTarget(where, name) if over is None else over.target(name) for name in self._exports
        ]

    async def look_in(self, targets: Sequence[NBDTarget]) -> None:
        """Connect to the exports, to ask what they hold. Not to be cancelled half-way.

        The connections stay until the exports end (K1).

        :raise NBDError: the server does not answer as it should.
        """
        if self._secured:  # what they are told by is QEMU's own TLS
            return
        opening = (
            Client.connect(
                target.server,
                export=target.export,
                contexts=[DEPTH, ALLOCATION],
                polite=False,
                stall=self.vm.stall,
            )
            for target in targets
        )
        opened = await asyncio.gather(*opening, return_exceptions=True)  # none is cut off (K1)
        self._readers += [one for one in opened if isinstance(one, Client)]
        for said in opened:
            if isinstance(said, BaseException):
                raise said

    async def prepare(self, pairs: Sequence[Pair]) -> list[bool]:
        """Give host space to what is to have all of it; say of each disk whether it reads as zeros.

        Where that cannot be asked, by `look_in`, none is said to.

        :raise UnsupportedError: one of which only the top is copied holds anything: that would
            stay, where the top holds nothing. Or one that is to have host space has not all of it.
        :raise Error: one cannot be given it.
        :raise NBDError: the server does not answer as it should.
        """
        if not self._readers:
            return [False for _ in pairs]
        asking = (make_ready(*one) for one in zip(self._readers, pairs, strict=True))
        ready: list[bool] = []
        for said in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(said, BaseException):
                raise said
            ready.append(said)
        return ready

    async def store(self) -> None:
        """Have what was written to its disks by now be on stable storage, as far as can be.

        QEMU has it done while the guest stands, and so much of it is left to be done then.

        :raise NBDError: a disk there failed.
        """
        await asyncio.gather(*(one.flush() for one in self._readers if one.can_flush))

    async def _close_readers(self) -> None:
        while self._readers:
            await self._readers.pop().close()

    # -- the guest comes

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[socket.socket]:
        """Have it wait for the guest at the other end of what is yielded.

        That is closed at the end, unless it was taken over (`socket.detach`).

        :raise CommandError: QEMU refused.
        """
        monitor, name = self.vm.monitor, stream_socket(self._run)
        if self._over is not None or monitor.forward is not None:
            where = await self.listen()
            try:
                ours = await open_socket(where)
            except OSError as error:
                raise Error(f"cannot connect to {where}: {error.strerror or error}") from None
            with ours:
                yield ours
            return
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                await monitor.pass_fd(name, theirs.fileno())
            try:
                await self._expect(f"fd:{name}")
            except BaseException:  # else QEMU has taken it: it has no name any more
                with contextlib.suppress(MonitorError, StalledError):
                    await tolerate(not_found, monitor.execute("closefd", {"fdname": name}))
                raise
            yield ours

    async def listen(self) -> Address:
        """Have it wait for the guest at an address: that is returned.

        :raise CommandError: QEMU refused.
        :raise Error: there is no place for its socket.
        """
        if self._over is not None:
            return await self._listen_over(self._over)
        if self.vm.monitor.forward is not None:
            return await self._listen_there(self.vm.monitor.forward)
        with place_for(self._folder, user_of(self.vm.monitor)):
            try:
                await self._expect(f"unix:{self._folder.socket}")
            except CommandError as error:
                error.remedy = "QEMU has to make a socket there: it may be in another container"
                raise
        return self._folder.address()

    @property
    def _secured(self) -> bool:
        return self._over is not None and self._over.there is not None

    async def _arm(self) -> None:
        """Give it its credentials for TLS, if there is to be any. Idempotent."""
        if self._over is None or self._over.there is None or self._armed:
            return
        self._armed = True
        options = credentials_object(self._over.there, self._credentials) | {"endpoint": "server"}
        try:
            await self.vm.monitor.execute("object-add", options)
        except CommandError as error:
            error.remedy = (
                f"on the destination's host QEMU needs {printable(self._over.there.directory)}, "
                "laid out for a server: ca-cert.pem, server-cert.pem and server-key.pem, or "
                "keys.psk, and the right to read them"
            )
            raise

    async def _disarm(self) -> None:
        if self._had is not None:
            await self.vm.monitor.execute("migrate-set-parameters", {"tls-creds": self._had})
            self._had = None
        if self._armed:
            await delete_object(self.vm.monitor, self._credentials)
            self._armed = False

    async def _listen_over(self, over: Over) -> Address:
        await self._arm()
        parameters = await self.vm.monitor.execute("query-migrate-parameters")
        self._had = str(parameters.get("tls-creds", ""))
        wanted = self._credentials if over.there is not None else ""
        await self.vm.monitor.execute("migrate-set-parameters", {"tls-creds": wanted})
        try:
            await self._expect(str(over.memory))
        except CommandError as error:
            error.remedy = f"QEMU has to listen at {over.memory}: name another port, or host"
            raise
        return over.memory

    async def _listen_there(self, forward: Forward) -> Address:
        try:
            await self._expect(f"unix:{forward.stream.there}")
        except CommandError as error:
            error.remedy = "QEMU has to make a socket beside its monitor: see what it may do there"
            raise
        return forward.stream.here

    async def _expect(self, uri: str) -> None:
        self.spoilt = True
        if self._preset is not None:
            await self._preset.apply()
        await self.vm.monitor.execute("stop")  # as -S does, which nothing in QEMU tells (F28)
        await self.vm.monitor.execute("migrate-incoming", {"uri": uri})

    async def end_exports(self) -> None:
        """Have nobody write to its disks from outside any more. Idempotent."""
        await delete_exports(self.vm.monitor, self._exports, self.vm.stall)
        self._exports.clear()
        await self._close_readers()
        if self._images is not None:
            await self._images.end()

    async def until_it_has_all(self) -> str:
        """Wait until all of the guest is there, and it stands still; for ever, if need be.

        Return its run state: `paused`, or what it stood as when it was sent (F42).
        """
        while True:
            migrates, runs = await self.vm.monitor.read("query-migrate", "query-status")
            if runs["status"] in STANDS and migrates.get("status") == "completed":
                return str(runs["status"])
            await asyncio.sleep(_POLL)

    async def run_state(self) -> str:
        """Return what it shows of its guest."""
        return str((await self.vm.monitor.execute("query-status"))["status"])

    async def run(self) -> Event:
        """Have the guest go on there: only whoever has the arbiter may. Return the word of that.

        :raise CommandError: QEMU refused; it stands.
        :raise StalledError: it was continued, and does not run.
        """
        with self.vm.monitor.subscribe("RESUME") as resumed:
            await self.vm.monitor.execute("cont")
            return await resumed.get(self.vm.stall)

    # -- after

    @property
    def gone(self) -> bool:
        """Whether its QEMU has certainly ended: by ssh a monitor may be lost without that."""
        lost = self.vm.monitor.closed and self.vm.monitor.can_pass_fds
        return lost or self._ended or self._has_ended()

    async def answers(self) -> bool:
        """Whether its monitor answers at once."""
        try:
            async with asyncio.timeout(_ANSWER):
                await self.vm.monitor.execute("query-status")
        except (TimeoutError, Error):
            return False
        return True

    async def end_images(self) -> str:
        """End the storage daemon, if there is one; say how it had ended by itself, if it had.

        :raise StalledError: it does not end.
        """
        return "" if self._images is None else await self._images.end()

    async def leave(self) -> None:
        """Take away all that is ours there. Idempotent.

        :raise Error: some of it could not be.
        """
        await self.end_exports()
        if self._serves:
            await self._server.stop(spare=self.spoilt)  # the guest is there, then
            self._serves = False
        await self._disarm()
        if self._preset is not None:
            await self._preset.restore()
        self._remove_folders()
        await lock.release_all(self.vm.monitor, reversed(self._locks))
        self._locks.clear()

    def _remove_folders(self) -> None:
        self._server.remove_folder()
        self._folder.remove()

    async def give_up(self) -> str:
        """Leave it as it was, or have it end if it is of no use; say what became of it."""
        try:
            if not await self.answers():
                lock.abandon(self._run)
                return self._of_silent()
            if self.spoilt:
                await self.end_exports()
                self._ended = await wayback.quit_vm(self.vm, self._has_ended)
                if not self._ended:
                    return self._of_silent()
                return "the destination, of no use any more, was ended (quit)"
            await self.leave()
        except Error as error:
            lock.abandon(self._run)
            _log.warning("what is left at the destination: %s", error)
            return "the destination may have things of ours left: end it, and start it anew"
        finally:
            await self._close_readers()
            self._remove_folders()
        return "the destination waits as before"

    def _of_silent(self) -> str:
        if self.gone:
            return "the destination's QEMU has ended"
        if self.spoilt:
            return (
                "the destination's QEMU does not answer: see that it is ended, and never continue "
                "it (cont)"
            )
        return (
            "the destination's QEMU does not answer, and has things of ours left: end it, and "
            "start it anew"
        )


async def _nobody(_: Address) -> None:
    """Make no connection before QEMU has the socket."""
