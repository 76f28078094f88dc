"""A monitor that its manager's own programs use, too: a `Transport` in short, polite turns.

Proxmox VE's daemons connect to a VM's one monitor, ask, and go: each waits for a few seconds at
most, and while one client stays, QEMU serves no other. So nobody here stays. A turn is a
connection: the greeting, what is asked by then, the answers; then it is closed, and only then is
anybody told an answer, so that no work of ours, however long, is done in a turn. QEMU takes those
who wait in the order in which they came: whoever came during a turn is before the next.

::

    a turn                             as long as QEMU takes for _AT_ONCE commands at most; while
                                       the guest is held for us, so long as it is: _LONGEST at most
    between two turns                  as long as the last one took, but _PAUSE at least, and
                                       _LONGEST_PAUSE at most: the guest may be held by then
    another client does not go         we wait, for _PATIENCE of the stall limit; after _SAY it is
                                       said who that is

What outlives a turn is QEMU's: objects, nodes, jobs, exports, and named descriptors, which are the
monitor's and not the connection's (measured). What does not: events are heard in turns alone, so
queries tell what became of a thing. And by the next turn another QEMU may listen there, of a VM
that was stopped and started again: the process that answers has to be the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qmpblock.address import ProxmoxAddress
from qmpblock.errors import CommandError, ConnectError, MonitorError, printable
from qmpblock.host.processes import Peer, describe_process
from qmpblock.host.socketholders import holders
from qmpblock.qemu.qmpsocket import QMPSocket
from qmpblock.qemu.transport import Event, LostError

__all__ = ["Turns"]

_AT_ONCE = 16
_PAUSE = 0.01  # seconds
_LONGEST_PAUSE = 0.1  # in which who found the queue full tries again
_LONGEST = 3.0
_PATIENCE = 0.9
_SAY = 3.0
_LEAVING = 1.0  # seconds for what was sent to be answered: the next client would get that (F22)
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Asked:
    """A command that somebody waits for.

    :ivar fd: that it takes along.
    :ivar told: to whom waits, what QEMU said; else it raises `failed`.
    """

    command: str
    arguments: Mapping[str, object] | None
    fd: int | None
    told: asyncio.Future[Any]
    answer: Any = None
    failed: Exception | None = None

    async def run(self, sock: QMPSocket) -> None:
        """Have it answered; tell nobody.

        :raise LostError: the connection was lost; the outcome is unknown.
        """
        self.failed = LostError()
        try:
            if self.fd is not None:
                sock.send_fd(self.fd)
            self.answer = await sock.execute(self.command, self.arguments)
            self.failed = None
        except CommandError as error:
            self.failed = error

    def tell(self) -> None:
        """Tell whoever waits. Idempotent."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if self.told.done():
            return  # nobody does any more
        if self.failed is None:
            self.told.set_result(self.answer)
        else:
            self.told.set_exception(self.failed)

    def give_up(self) -> None:
        """Tell that it was not run."""
        self.failed = LostError()
        self.tell()


class Turns:
    """A `Transport`: a monitor that is had by turns."""

    version: tuple[int, int, int] = (0, 0, 0)
    package = ""
    can_pass_fds = True  # the address is of this host
    by_turns = True
    forward = None
    lender = None

    def __init__(
        self,
        address: ProxmoxAddress,
        on_event: Callable[[Event, int], None],
        on_end: Callable[[], None],
    ) -> None:
        self._address = address
        self._on_event = on_event
        self._on_end = on_end
        self._peer: Peer | None = None
        self._asked: deque[_Asked] = deque()
        self._wake = asyncio.Event()
        self._fd: int | None = None  # that the next command takes along
        self._unlogged = False
        self._stall = 0.0
        self._closed = False
        self._worker: asyncio.Task[None] | None = None
        self._rest_until = 0.0
        self._kept = 0  # how many are at work that must not wait for others
        self.ended = ""

    @property
    def peer_pid(self) -> int | None:
        """QEMU's process; None: not known."""
        return None if self._peer is None else self._peer.known()

    async def open(self, timeout: float, stall: float) -> None:
        """Have a first turn, in which nothing is asked. See `Monitor.connect`."""
        self._stall = stall
        async with self._connected(timeout) as sock:
            self.version, self.package = sock.version, sock.package
            self._peer = sock.peer
        if self._peer is None or self._peer.start is None:
            raise ConnectError(
                f"which process answers at {self._address} cannot be seen from here, and that has "
                "to be the same one each time",
                remedy="run this on the VM's host, in its namespace of processes",
            )
        self._worker = asyncio.create_task(self._have_turns())

    async def close(self, stall: float) -> None:
        """End: what was sent is answered first, as nobody else is to get the answer. Idempotent."""
        self._closed = True
        self._wake.set()
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=min(stall, _LEAVING))
            self._worker.cancel()
            await asyncio.wait([self._worker])
        self._drop_fd()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        out_of_band: bool = False,
    ) -> Any:
        """Run a command; see `Transport`. Cancelled before its turn came, it is never sent."""
        if out_of_band:
            raise CommandError(
                command, arguments, "GenericError", "a monitor in turns takes nothing out of band"
            )
        if self._worker is None or self._worker.done() or self._closed:
            raise LostError
        asked = _Asked(command, arguments, self._fd, asyncio.get_running_loop().create_future())
        self._fd = None
        self._asked.append(asked)
        self._wake.set()
        try:
            return await asked.told
        finally:
            if asked in self._asked:
                self._asked.remove(asked)
                asked.tell()  # which closes what it was to take along

    def send_fd(self, fd: int) -> None:
        """Have the next command take a descriptor along."""
        self._drop_fd()
        self._fd = os.dup(fd)

    async def disks_called(self) -> Mapping[str, str]:
        """Nothing: QEMU's own names are all that there are."""
        return {}

    def keep_turn(self, kept: bool) -> None:
        """Have what is run from now on be one turn, or no longer."""
        self._kept += 1 if kept else -1
        self._wake.set()

    def keep_unlogged(self, unlogged: bool) -> None:
        """Have no log show what is sent and read from now on."""
        self._unlogged = unlogged

    # turns

    async def _have_turns(self) -> None:
        try:
            while await self._is_wanted():
                await asyncio.sleep(self._rest_until - asyncio.get_running_loop().time())
                if self._asked:  # and whoever asked has not gone
                    await self._have_turn()
        except MonitorError as error:
            self._end(error.message)
        except LostError as error:
            self._end(error.why)
        finally:
            while self._asked:
                self._asked.popleft().give_up()

    async def _have_turn(self) -> None:
        """Have what is asked answered, by a connection of its own.

        :raise LostError: it was lost, or it is another QEMU by now.
        :raise MonitorError: there is none to be had.
        """
        batch: list[_Asked] = []
        try:
            async with self._connected(self._stall * _PATIENCE) as sock:
                self._check_same(sock.peer)
                end = asyncio.get_running_loop().time() + _LONGEST
                await self._run_all(sock, batch)
                while self._kept and not self._closed and asyncio.get_running_loop().time() < end:
                    _tell(batch)
                    if await self._is_wanted_before(end):
                        await self._run_all(sock, batch)
        finally:
            _tell(batch)

    async def _run_all(self, sock: QMPSocket, batch: list[_Asked]) -> None:
        """Have what is asked answered, but tell nobody.

        :param batch: where that is put.
        :raise LostError: the connection was lost.
        """
        batch += (self._asked.popleft() for _ in range(min(_AT_ONCE, len(self._asked))))
        sock.keep_unlogged(self._unlogged)
        await asyncio.gather(*(asked.run(sock) for asked in batch))

    @asynccontextmanager
    async def _connected(self, timeout: float) -> AsyncIterator[QMPSocket]:
        """Connect, for one turn.

        :param timeout: seconds to wait for who is before us.
        """
        sock = QMPSocket(self._address, self._on_event, _nothing)
        loop = asyncio.get_running_loop()
        late = loop.call_later(_SAY, self._say_who_holds_it)
        try:
            await sock.open(timeout, self._stall)
        finally:
            late.cancel()
        began = loop.time()
        try:
            yield sock
        finally:
            await sock.close(_LEAVING)
            now = loop.time()
            self._rest_until = now + min(max(_PAUSE, now - began), _LONGEST_PAUSE)

    async def _is_wanted(self) -> bool:
        """Wait until something is asked; False where nothing will be."""
        while not self._asked and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        return not self._closed

    async def _is_wanted_before(self, end: float) -> bool:
        """Wait until something is asked in the same turn; False where nothing is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                while self._kept and not self._asked and not self._closed:
                    self._wake.clear()
                    await self._wake.wait()
        return bool(self._kept and self._asked)

    def _check_same(self, peer: Peer | None) -> None:
        """See that it is still that QEMU.

        :raise LostError: it is not.
        """
        if peer != self._peer:
            raise LostError(
                f"the VM was stopped, and another QEMU answers at {self._address} by now"
            )

    def _say_who_holds_it(self) -> None:
        who = ", ".join(describe_process(pid) for pid in holders(self._address))
        _log.warning(
            "waiting for the monitor of %s, which serves one client at a time, and that is %s",
            self._address,
            who or "one that cannot be seen from here",
        )

    def _end(self, why: str) -> None:
        if not self.ended:
            self.ended = printable(why) or "QEMU ended it"
            self._on_end()

    def _drop_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _tell(batch: list[_Asked]) -> None:
    """Tell all who wait, and forget them."""
    for asked in batch:
        asked.tell()
    batch.clear()


def _nothing() -> None:
    """Do nothing: that a turn ends is no news."""
