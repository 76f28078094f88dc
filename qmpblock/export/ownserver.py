"""Our own NBD server in a QEMU: started, known again, stopped.

A VM has one NBD server. Ours listens on a socket that we made and handed over, so that QEMU needs
no path that it could not reach; where no descriptor can be passed, on a path or a TCP port. When it
is started and stopped, among all else that exports take, is said in `qmpblock.export.session`.
On another host it listens beside its VM's monitor, where the ssh to that leads (`host.forward`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable

from qmpblock.address import Address, TCPAddress
from qmpblock.errors import BusyError, CommandError, Error
from qmpblock.export.server import (
    answers,
    delete_object,
    handshakes_end,
    is_listening,
)
from qmpblock.host.forward import Forward
from qmpblock.host.socketfolder import SocketFolder
from qmpblock.names import (
    credentials_name,
    listener_name,
    socket_folder,
)
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.connection import NBDAccess
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import already_running, in_use, not_found, not_running, tolerate

__all__ = ["NOTHING_LEFT", "OwnServer"]

#: What stands where all that was added to QEMU is removed again.
NOTHING_LEFT = "nothing of ours is left in the VM"

_LISTENS = (
    "the NBD server at %s is left in its QEMU, which might hang if it were stopped: it has no "
    "exports any more (nbd-server-stop, once nobody is connected)"
)
_PORTS = range(49152, 65536)  # RFC 6335, dynamic ports
_TRIES = 16  # ports
_log = logging.getLogger(__name__)
_TRAVEL = 0.5  # seconds for the end of a connection to come to another host


class OwnServer:
    """An NBD server of ours in QEMU, which has one at most: started, known again, stopped.

    :ivar path: of its socket, once it is chosen; also the `ports` on which it may listen.
    :ivar where: to connect to, where that is not handed over.

    :param at: where it listens; None: at a place of its own choice.
    :param credentials: the object with those for TLS, where it listens there.
    :param lasting: whether its socket stays where it is, for clients of others, until it stops.
    """

    def __init__(
        self,
        monitor: Monitor,
        access: NBDAccess,
        run: str,
        *,
        lasting: bool = False,
        at: TCPAddress | None = None,
        credentials: str | None = None,
    ) -> None:
        self._at = at
        self._credentials = credentials
        self._lasting = lasting
        self.path = ""
        self.ports: list[int] = []
        self.where: Address | None = None
        self._monitor = monitor
        self._access = access
        self._run = run
        self._folder: SocketFolder | None = None
        self._runs = False
        self._unsure = False  # whether the server that runs is ours
        self._tls_object = False

    @property
    def over_tcp(self) -> bool:
        """Whether it listens on a TCP port of the monitor's host."""
        return isinstance(self._monitor.address, TCPAddress) and bool(
            self._access.tls_creds or self._access.insecure
        )

    def choose_place(self) -> None:
        """Say where it will listen. Makes nothing.

        Named here, for the lock's record, and made under the lock: a controller that is killed
        leaves nothing that the record does not name.
        """
        forward = self._monitor.forward
        if forward is not None and self._at is None:
            self.path = forward.nbd.there
            return
        self._folder = SocketFolder(socket_folder(self._run))
        self.path = self._folder.socket
        if self.over_tcp:
            self.ports = [secrets.choice(_PORTS) for _ in range(_TRIES)]

    async def start(
        self, hand_over: Callable[[Address], Awaitable[None]], connections: int
    ) -> None:
        """Start it, where `choose_place` said. Must not be cancelled half-way.

        :param hand_over: makes so many connections to it, where its socket is passed to QEMU:
            then, before QEMU has that.
        :raise BusyError: another NBD server runs in this VM.
        :raise CommandError: QEMU refused.
        :raise Error: there is no directory for a socket.
        """
        forward = self._monitor.forward
        if self._at is not None:
            await self._listen_at(self._at)
            return
        if forward is not None:
            await self._listen_there(forward)
            return
        assert self._folder is not None  # choose_place() went before
        try:
            self._folder.make()
        except OSError as error:
            raise Error(
                f"cannot make the directory {self._folder.path} for a socket: {error.strerror}",
                standing=NOTHING_LEFT,
                remedy="set TMPDIR to a directory that this user may write to, and nobody else, "
                "unless it is sticky as /tmp is (mode 1777)",
            ) from None
        if self._monitor.can_pass_fds:
            await self._listen_and_pass(self._folder, hand_over, connections)
        elif self.over_tcp:
            await self._listen_on_tcp()
        else:
            try:
                await self._start_server({"type": "unix", "data": {"path": self.path}})
            except CommandError as error:
                error.remedy = (
                    "QEMU may run as another user or in another container; use its UNIX "
                    "monitor, or --tls-creds DIR or --insecure for NBD over TCP"
                )
                raise
            self.where = self._folder.address()

    async def _listen_and_pass(
        self,
        folder: SocketFolder,
        hand_over: Callable[[Address], Awaitable[None]],
        connections: int,
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(folder.socket)
            listener.listen(connections)
            await hand_over(folder.address())
            name = listener_name(self._run)
            await self._monitor.pass_fd(name, listener.fileno())
            try:
                await self._start_server({"type": "fd", "data": {"str": name}})
            except (BusyError, CommandError):
                # The server takes the descriptor only where it starts.
                await tolerate(not_found, self._monitor.execute("closefd", {"fdname": name}))
                raise
        if not self._lasting:
            folder.remove()

    async def _listen_at(self, at: TCPAddress) -> None:
        tls = {} if self._credentials is None else {"tls-creds": self._credentials}
        address: dict[str, object] = {
            "type": "inet",
            "data": {"host": at.host, "port": str(at.port)},
        }
        try:
            await self._start_server(address, **tls)
        except CommandError as error:
            error.remedy = f"QEMU has to listen at {at}: name another port, or its own address"
            raise
        self.where = at

    async def _listen_there(self, forward: Forward) -> None:
        try:
            await self._start_server({"type": "unix", "data": {"path": self.path}})
        except CommandError as error:
            error.remedy = (
                "QEMU has to make a socket beside its monitor, and the user that ssh logs in as "
                "to connect to it: see what that directory allows both"
            )
            raise
        self.where = forward.nbd.here

    async def _listen_on_tcp(self) -> None:
        assert isinstance(self._monitor.address, TCPAddress)  # over_tcp
        host = self._monitor.address.host
        tls: dict[str, object] = {}
        if self._access.tls_creds:
            tls = {"tls-creds": credentials_name(self._run)}
            self._tls_object = True
            await self._monitor.execute(
                "object-add",
                {
                    "qom-type": "tls-creds-x509",
                    "id": tls["tls-creds"],
                    "endpoint": "server",
                    "dir": self._access.tls_creds,
                    "verify-peer": True,
                },
            )
        for attempt, port in enumerate(self.ports, 1):
            try:
                await self._start_server(
                    {"type": "inet", "data": {"host": host, "port": str(port)}}, **tls
                )
            except CommandError as error:
                if in_use(error) and attempt < len(self.ports):
                    continue
                raise
            self.where = TCPAddress(host, port)
            return

    async def _start_server(self, address: dict[str, object], **more: object) -> None:
        self._runs = True  # as intent, like all that is removed later: it copes with "not there"
        if Capabilities(self._monitor.version).nbd_handshake_limit_can_be_lifted:
            more["handshake-max-seconds"] = 0  # our own wait has a limit, which the user chose
        try:
            await self._monitor.execute("nbd-server-start", {"addr": address, **more})
        except CommandError as error:
            self._runs = False
            if already_running(error):
                raise BusyError(
                    "an NBD server that is not ours already runs in this VM, and QEMU has "
                    "room for one only",
                    standing="it was not touched, and nothing of ours is left in the VM",
                    remedy="give its address with --nbd ADDRESS (QEMU cannot tell it; whoever "
                    "started it can, or: ss -xlp), and we add and remove our own export there",
                ) from error
            raise
        except BaseException:
            self._unsure = True
            raise

    def doubt(self) -> None:
        """Note that somebody may have stopped it, and started one of their own since."""
        self._unsure = True

    async def check_ours(self) -> None:
        """See whether the server that runs is this one, where that is in doubt."""
        if self._runs and self._unsure:
            listener = {"fdname": listener_name(self._run)}
            await tolerate(not_found, self._monitor.execute("closefd", listener))
            self._runs = await self._is_ours()

    async def stop(self, *, spare: bool = False) -> None:
        """Stop it, if it runs, and remove what it was started with. Idempotent.

        :param spare: whether its QEMU must not hang: one that anybody may connect to, and so be in
            a handshake with, is left, where to stop it then would hang that (K14).

        :raise BusyError: a client does not end its handshake (K14).
        """
        if self._runs:
            hangs = Capabilities(self._monitor.version).nbd_server_stop_hangs_in_handshake
            if hangs and self._at is not None and spare:
                _log.warning(_LISTENS, self._at)
                return
            if hangs and (self._at is not None or self._monitor.forward is not None):
                await asyncio.sleep(_TRAVEL)  # who is connected there cannot be seen from here
            await handshakes_end(self._monitor, self.path)
            await tolerate(not_running, self._monitor.execute("nbd-server-stop"))
        if self._tls_object:
            await delete_object(self._monitor, credentials_name(self._run))

    async def _is_ours(self) -> bool:
        if is_listening(self.path):
            return True
        address = self._monitor.address
        host = address.host if isinstance(address, TCPAddress) else ""
        return await answers(host, self.ports)

    def remove_folder(self) -> None:
        """Remove the socket and its directory: all that may connect has. Idempotent."""
        if self._folder is not None:
            self._folder.remove()
