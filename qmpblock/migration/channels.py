"""Channels: the connections by which the memory goes, where these are several (multifd).

QEMU makes them, one after the other, to a socket of ours, and for each a relay passes on what goes
through it. They reach the destination in the order in which they came: the first one is that of all
but pages, by which a QEMU 7.2 knows it. Held in our hand, they are cut together, as one would be
(`qmpblock.migration.stream`); where this process dies, the kernel does so.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import ExitStack

from qmpblock.address import Address
from qmpblock.copying.relay import Relay, listen, place_for
from qmpblock.host.socketfolder import SocketFolder, remove_socket
from qmpblock.names import arrival_wire, stream_wire
from qmpblock.sockets import open_socket

__all__ = ["Channels", "clear_channels"]

_log = logging.getLogger(__name__)


class Channels:
    """The relays of one migration's memory. `open`; QEMU connects to `path`; then `close`.

    :param name: of the directory of the socket (`names.stream_wire`).
    :param there: where the destination waits for them.
    :param number: of connections: then nobody can connect any more.
    """

    def __init__(self, name: str, there: Address, number: int) -> None:
        self._folder = SocketFolder(name)
        self._there = there
        self._number = number
        self._stack = ExitStack()
        self._relays: list[Relay] = []
        self._taking: asyncio.Task[None] | None = None

    @property
    def path(self) -> str:
        """Of the socket to which QEMU is to connect."""
        return self._folder.socket

    def open(self, user: int | None) -> None:
        """Wait for the connections from now on.

        :param user: as whom QEMU runs, where that is another one than we.
        :raise Error: there is no place for the socket.
        """
        with place_for(self._folder, user):
            listener = listen(self._folder, self._number)
        self._taking = asyncio.create_task(self._take(listener))

    async def _take(self, listener: socket.socket) -> None:
        """Take them as they come; where one leads nowhere, QEMU finds it closed, and gives up."""
        loop = asyncio.get_running_loop()
        with listener:
            try:
                while len(self._relays) < self._number:
                    ours, _ = await loop.sock_accept(listener)
                    await self._pass_on(ours)
            except OSError as error:
                _log.warning("cannot connect to %s: %s", self._there, error.strerror or error)

    async def _pass_on(self, ours: socket.socket) -> None:
        try:
            there = await open_socket(self._there)
        except BaseException:
            ours.close()
            raise
        self._relays.append(self._stack.enter_context(Relay.between(there, ours)))

    def cut(self) -> None:
        """Close all of them, and take none any more. Idempotent."""
        if self._taking is not None:
            self._taking.cancel()
        for relay in self._relays:
            relay.cut()

    def close(self) -> None:
        """Let go of them: leave no thread, descriptor or file. Idempotent."""
        self.cut()
        self._stack.close()
        self._folder.remove()


def clear_channels(run: str) -> None:
    """Remove the sockets of a migration whose controller died, where they are left."""
    for name in (stream_wire(run), arrival_wire(run)):
        remove_socket(SocketFolder(name).socket)
