"""Wire: an NBD target of a copy as a node in QEMU, reached by a relay, and taken away again.

::

    laying                                      taking away
    1. relay: connect, wait for the greeting    1. cut the relay, where the copy has failed
    2. object-add of the credentials, for TLS   2. blockdev-del of the node
    3. blockdev-add of the node                 3. object-del of the credentials
                                                4. close the relay

A node on which a job lies that is to go on later stays (`Wire.leave`), with nothing at its other
end; another wire is laid to it then, at the very path to which QEMU connects again (K25).

While QEMU opens a node or closes it the guest is held, however long the server takes (K24). So
that has a limit, at which the relay cuts itself: QEMU then goes on with an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qmpblock.address import UnixAddress
from qmpblock.cancellation import undisturbed
from qmpblock.copying.relay import End, Relay
from qmpblock.copying.target import Credentials, NBDTarget, credentials_object, nbd_node
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    NBDConnectError,
    RequestError,
    StalledError,
    UnsupportedError,
    printable,
)
from qmpblock.export.ownserver import NOTHING_LEFT
from qmpblock.export.server import delete_object
from qmpblock.host.processes import users_of
from qmpblock.host.socketfolder import SocketFolder, remove_socket
from qmpblock.names import wire_credentials, wire_node
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.qemuio import qemu_io
from qmpblock.qemu.refusals import no_node, tolerate

__all__ = [
    "HOLD",
    "Wire",
    "check_target",
    "clear_wire",
    "credentials_in",
    "hold_of",
    "user_of",
    "wire_socket",
]

#: Seconds that a server has for an answer while the guest is held for it: by the opening and the
#: closing of the node, and by each command of a copy's that drains it (`Relay.within`).
HOLD = 5.0
_ANSWERS = 2  # in a row, by which a node shows that it is connected; shaking hands looks like one
_LOOK = 0.01


class Wire:
    """A node of ours in QEMU over an export of an NBD server. Made by `open`.

    :ivar node: its name: a target of a job, or what a format node lies on.
    :ivar relay: what the bytes pass through: counters, `within`, `cut`.
    :ivar hold: see `hold_of`; in seconds, of this one.
    """

    def __init__(
        self, vm: Connection, target: NBDTarget, node: str, relay: Relay, hold: float
    ) -> None:
        self.target = target
        self.node = node
        self.relay = relay
        self.hold = hold
        self._monitor = vm.monitor
        self._stays = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        vm: Connection,
        target: NBDTarget,
        *,
        run: str,
        number: int = 0,
        credentials: Credentials | None = None,
        discard: str = "unmap",
        again: bool = False,
    ) -> AsyncIterator[Wire]:
        """Lay a wire; leaving takes it away, whether or not it was cut, and is not interrupted.

        While it lies the relay waits for an answer as long as `vm.stall`, then cuts itself. One
        request may take long without a word (F23), so that should not be short.

        Whatever lies on the node (a job, a format node) must be gone when this is left. Left by an
        exception it is cut first, so that nothing waits for the server. Otherwise QEMU flushes.

        :param run: of the copy; `number`: of this wire among its wires.
        :param credentials: for TLS.
        :param discard: see `qmpblock.copying.target.nbd_node`.
        :param again: the node is there, of a wire that was left, and whatever lies on it is paused.
            Where it is not reached, it stays for whoever undoes what lies there.
        :raise RequestError: what is asked for cannot be; nothing was touched.
        :raise NBDConnectError: no server answers, or QEMU and it do not agree; nothing is left.
        :raise StalledError: on leaving: the server did not answer to the last flush.
        """
        check_target(vm, target, credentials)
        name, stall, hold = wire_node(run, number), vm.stall, hold_of(vm)
        if again:
            remove_socket(wire_socket(run, number))  # nothing asks meanwhile
        async with Relay.open(
            target.server, name=name, user=user_of(vm.monitor), patience=hold
        ) as relay:
            wire = cls(vm, target, name, relay, hold)
            kept = False
            try:
                wire._stays = again
                await undisturbed(wire._meet() if again else wire._add(credentials, discard))
                wire._stays = False
                with relay.within(stall):
                    yield wire
                kept = True
            finally:
                if not kept:
                    relay.cut()
                if not wire._stays:
                    with relay.within(hold), vm.monitor.once_silent(hold):
                        await undisturbed(clear_wire(vm.monitor, name))
            if relay.ended is End.STALLED:
                raise StalledError(
                    f"the NBD server of {printable(target)} did not answer for {hold:g} s",
                    standing="the connection was cut, and what was written last may not be on its "
                    "storage",
                    remedy="do not rely on this copy; look what that server waits for",
                )

    def cut(self) -> None:
        """End the connection, now; see `Relay.cut`."""
        self.relay.cut()

    def leave(self) -> None:
        """End the connection, and have the node stay, for another wire to be laid to it.

        What QEMU asks of it until then fails at once: nobody else can listen at its path. Only for
        what does not lie on it with anything under way.
        """
        self.cut()
        self._stays = self.relay.stays = True

    def is_gone(self) -> None:
        """Note that its node and credentials are gone: nothing is to be taken away any more."""
        self._stays = True

    async def _meet(self) -> None:
        """Have QEMU connect to the relay, from the node that is there.

        By requests that nothing depends on: the first ones fail, while it finds that the other end
        is gone, and connects, which it does not wait for. That one was answered the relay tells.

        :raise NBDConnectError: it does not.
        """
        relay, answered = self.relay, 0
        deadline = time.monotonic() + HOLD
        while answered < _ANSWERS:
            if relay.ended is not None or time.monotonic() > deadline:
                raise NBDConnectError(f"QEMU does not connect to {printable(self.target)} again")
            await asyncio.sleep(_LOOK)
            before = relay.received
            await qemu_io(self._monitor, self.node, "flush")
            answered = answered + 1 if relay.received > before else 0

    async def _add(self, credentials: Credentials | None, discard: str) -> None:
        name = None
        try:
            if credentials is not None:
                name = wire_credentials(self.node)
                await self._monitor.execute("object-add", credentials_object(credentials, name))
            socket = self.relay.path
            options = nbd_node(
                self.target, self.node, socket=socket, credentials=name, discard=discard
            )
            await self._monitor.execute("blockdev-add", options)
        except CommandError as error:
            why = error.description
            if self.relay.ended is End.STALLED:
                why = f"the server did not go on for {self.relay.patience:g} s ({why})"
            raise NBDConnectError(
                f"QEMU cannot open the target {printable(self.target)}: {printable(why)}",
                standing=NOTHING_LEFT,
                remedy="look whether there is such an export, that may be written to, and whether "
                "both sides agree about TLS; if QEMU cannot find or use the socket, it runs in "
                "another container or is confined: set TMPDIR to a place that both can use",
            ) from error


def hold_of(vm: Connection) -> float:
    """Return how many seconds a server has for an answer while a VM's guest is held for it.

    `HOLD`, or half the stall limit, where that is less: what waits for QEMU, which waits for the
    server, would be given up first, and stay.
    """
    return min(HOLD, vm.stall / 2)


def credentials_in(directory: str) -> Credentials:
    """Return the credentials of a directory, laid out as for QEMU: keys where it has `keys.psk`."""
    keys = (Path(directory) / "keys.psk").is_file()
    return Credentials(directory, "psk" if keys else "x509")


def check_target(vm: Connection, target: NBDTarget, credentials: Credentials | None) -> None:
    """Refuse what cannot be; nothing is touched.

    :raise RequestError: TLS without credentials or the other way round, or without a name that
        the certificate must have.
    :raise UnsupportedError: QEMU is on another host, where our relay is not.
    """
    if target.tls != (credentials is not None):
        raise RequestError(
            f"the target {printable(target)} "
            + ("has TLS, for which credentials are needed" if target.tls else "is without TLS"),
            standing=UNTOUCHED,
            remedy="give TLS credentials with nbds://, and only there",
        )
    if credentials is not None and credentials.kind == "x509" and target.certified_name is None:
        raise RequestError(
            f"whom the certificate of {printable(target)} must name is not said",
            standing=UNTOUCHED,
            remedy="add &tls-hostname=NAME to the target",
        )
    address = vm.monitor.address
    if not isinstance(address, UnixAddress) and not address.loopback:
        raise UnsupportedError(
            f"the monitor {address} is on another host, and QEMU has to reach the target by a "
            "socket of this process",
            standing=UNTOUCHED,
            remedy="run qmpblock on the VM's host",
        )


def wire_socket(run: str, number: int = 0) -> str:
    """Return where the socket of a wire will be, for a record of what is to be cleared."""
    return SocketFolder(wire_node(run, number)).socket


async def clear_wire(monitor: Monitor, wire: str, socket: str | None = None) -> None:
    """Take a wire out of QEMU, also one of a controller that died. Idempotent.

    :param wire: the name of its node.
    :param socket: where its relay's socket was, if that is to be removed, too.
    :raise CommandError: something lies on the node still.
    """
    await tolerate(no_node, monitor.execute("blockdev-del", {"node-name": wire}))
    await delete_object(monitor, wire_credentials(wire))
    if socket is not None:
        remove_socket(socket)


def user_of(monitor: Monitor) -> int | None:
    """Return as whom QEMU runs; None where that cannot be told, or is several."""
    if monitor.peer_pid is None:
        return None
    try:
        users = users_of(monitor.peer_pid)
    except OSError:
        return None  # it has ended, as the next command to it says
    return users[0] if len(users) == 1 else None
