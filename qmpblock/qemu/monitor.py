"""Monitor: the QMP of one running QEMU, however it is reached (`qmpblock.qemu.transport`).

What a controller that may not fail needs:

- every failure as one of `qmpblock.errors`, with the command, its arguments and QEMU's words;
- event subscriptions that exist before the command that causes the event is sent, and that
  are bounded;
- answers that are what they should be (`qmpblock.qemu.answers`): whoever has QEMU may answer as
  he likes;
- a lost connection that says so: whether the command was carried out is then unknown.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from qmpblock.address import LibvirtAddress, MonitorAddress, ProxmoxAddress, parse_monitor
from qmpblock.errors import CommandError, DisconnectedError, Error, StalledError, UnsupportedError
from qmpblock.host.forward import Forward
from qmpblock.qemu.answers import checked
from qmpblock.qemu.lender import Lender
from qmpblock.qemu.libvirtmonitor import LibvirtMonitor
from qmpblock.qemu.qmpsocket import QMPSocket
from qmpblock.qemu.transport import Event, LostError, Transport
from qmpblock.qemu.turns import Turns

__all__ = ["Event", "Monitor", "Subscription"]

T = TypeVar("T")

_QUEUE_LIMIT = 4096  # events kept for one subscription that nobody reads
_QUEUE_BYTES = 4 << 20  # and how long they may be together; QEMU's have some hundred


class Subscription:
    """Events of some names, from the moment this object exists.

    A context manager; leave it to stop listening. Holds at most 4096 unread events, and 4 MiB
    of them; older ones are dropped and counted in `lost`: events are hints, queries are the
    truth.
    """

    def __init__(
        self, monitor: Monitor, names: frozenset[str], match: Callable[[Event], bool] | None
    ) -> None:
        self._monitor = monitor
        self._names = names
        self._match = match
        self._events: deque[tuple[Event, int]] = deque()
        self._size = 0  # bytes of them
        self._wake = asyncio.Event()
        self.lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and forget what was not read. Idempotent."""
        self._monitor._subscriptions.discard(self)
        self.pending()

    def _put(self, event: Event, size: int) -> None:
        if self._names and event["event"] not in self._names:
            return
        if self._match is not None and not self._match(event):
            return
        self._events.append((event, size))
        self._size += size
        while len(self._events) > _QUEUE_LIMIT or self._size > _QUEUE_BYTES:
            self._take()
            self.lost += 1
        self._wake.set()

    def _take(self) -> Event:
        event, size = self._events.popleft()
        self._size -= size
        return event

    async def get(self, timeout: float | None = None) -> Event:
        """Return the next event.

        Cancelling loses no event.

        :param timeout: seconds to wait; None waits as long as the connection lives.
        :raise StalledError: nothing came within `timeout`.
        :raise DisconnectedError: the connection was lost and no event is left.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self._events:
                    if self._monitor.closed:
                        raise self._monitor._lost(None)
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            wanted = ", ".join(sorted(self._names)) or "any event"
            raise StalledError(f"QEMU sent no {wanted} for {timeout:g} s") from None
        return self._take()

    def pending(self) -> list[Event]:
        """Return, and forget, the events that have come so far, without waiting."""
        events = [event for event, _ in self._events]
        self._events.clear()
        self._size = 0
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            yield await self.get()


class Monitor:
    """A QMP connection. Make one with `connect`; `async with` closes it.

    Commands run one after the other, as they do inside QEMU.
    """

    def __init__(self, address: MonitorAddress, stall: float) -> None:
        self.address = address
        self.stall = stall
        self.closed = False
        tell = (self._on_event, self._on_end)
        self._transport: Transport
        if isinstance(address, LibvirtAddress):
            self._transport = LibvirtMonitor(address, *tell)
        elif isinstance(address, ProxmoxAddress):
            self._transport = Turns(address, *tell)
        else:
            self._transport = QMPSocket(address, *tell)
        self._subscriptions: set[Subscription] = set()
        self._turn = asyncio.Lock()
        self._silent = False  # since an answer was waited for in vain; then these count
        self._patience: list[float] = []

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's."""
        return self._transport.version

    @property
    def package(self) -> str:
        """What QEMU says of the package that it is of."""
        return self._transport.package

    @property
    def peer_pid(self) -> int | None:
        """The process that made the listening socket: QEMU, or a manager. None: not known."""
        return self._transport.peer_pid

    @property
    def forward(self) -> Forward | None:
        """The ssh by which it goes to another host; None where it does not."""
        return self._transport.forward

    @property
    def can_pass_fds(self) -> bool:
        """Whether file descriptors can be handed to QEMU."""
        return self._transport.can_pass_fds

    @property
    def by_turns(self) -> bool:
        """Whether others have it in between: events are missed, and a command may wait for them."""
        return self._transport.by_turns

    @classmethod
    async def connect(
        cls, address: str | MonitorAddress, *, greeting_timeout: float = 5.0, stall: float = 60.0
    ) -> Self:
        """Connect, wait for the greeting, negotiate.

        :param address: where the monitor listens (design.md, contracts).
        :param greeting_timeout: seconds for the connection, and again for the greeting.
        :param stall: seconds that one command may take before `execute` gives up on it.
        :raise RequestError: the address cannot be read.
        :raise ConnectError: nothing listens there.
        :raise GreetingError: no greeting came, or it was not QMP.
        :raise MonitorHeldError: another client holds it; says which process, if it can.
        """
        where = parse_monitor(address) if isinstance(address, str) else address
        monitor = cls(where, stall)
        await monitor._transport.open(greeting_timeout, stall)
        return monitor

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Idempotent; never raises for a connection that is already lost.

        A peer that does not read what was sent is given as long as a command.
        """
        self.closed = True
        await self._transport.close(self.stall)

    @contextmanager
    def in_one_turn(self) -> Iterator[None]:
        """Let nobody have it before the body has ended, where others have it in between.

        For what must not wait for them, since the guest does; for three seconds at most.
        """
        self._transport.keep_turn(True)
        try:
            yield
        finally:
            self._transport.keep_turn(False)

    @contextmanager
    def once_silent(self, patience: float) -> Iterator[None]:
        """Wait no longer than so many seconds for an answer, where one was waited for in vain.

        While the body runs. For what takes much away: a QEMU that is stopped would be waited for
        again with each command.
        """
        self._patience.append(patience)
        try:
            yield
        finally:
            self._patience.remove(patience)

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run one QMP command and return what QEMU returned.

        Cancelling leaves the outcome unknown: the command may have been sent.

        :raise CommandError: QEMU refused it.
        :raise GraphError: the answer is not what such an answer is like.
        :raise DisconnectedError: the connection was lost; the outcome is unknown.
        :raise StalledError: no reply within the stall limit; the outcome is unknown.
        """
        async with self._turn:
            return await self._execute(command, arguments)

    async def read(self, *commands: str | tuple[str, Mapping[str, object]]) -> list[Any]:
        """Run commands that change nothing, and return what QEMU returned to each, in their order.

        They are sent at once, and run one after the other: QEMU takes the next one while the last
        answer is on its way.

        :param commands: each its name, or that and its arguments.
        :raise CommandError: QEMU refused one; the first.
        :raise Error: as of `execute`.
        """
        async with self._turn:
            asked = [(one, None) if isinstance(one, str) else one for one in commands]
            sent = [asyncio.ensure_future(self._execute(*one)) for one in asked]
            try:
                return [await one for one in sent]
            finally:
                for one in sent:
                    one.cancel()
                await asyncio.gather(*sent, return_exceptions=True)

    async def each(self, *commands: tuple[str, Mapping[str, object]]) -> list[Any]:
        """Run commands of which none rests on another; return QEMU's word to each, in their order.

        They are sent at once, as by `read`. What QEMU refuses does not keep it from the others: its
        word is then a CommandError, which is returned, not raised.

        Cancelling leaves the outcome unknown: they may have been sent.

        :raise Error: as of `execute`, but for CommandError.
        """
        async with self._turn:
            said = await asyncio.gather(
                *(self._execute(*one) for one in commands), return_exceptions=True
            )
        for one in said:
            if isinstance(one, BaseException) and not isinstance(one, CommandError):
                raise one
        return said

    async def execute_at_once(
        self, command: str, arguments: Mapping[str, object] | None = None
    ) -> Any:
        """Run a QMP command out of band: it does not wait for one that QEMU is still at work on.

        Of all commands `yank` and few others can. Whether QEMU answers while its main loop hangs
        depends on when this connection was made: before.

        :raise Error: as `execute`; besides, CommandError: the command cannot be run so.
        """
        return await self._execute(command, arguments, out_of_band=True)

    async def read_key(self, path: str, name: str) -> str:
        """Read a property of a `secret` object, by `qom-get`; no log has it.

        :raise Error: as `execute`.
        """
        async with self._turn:
            self._transport.keep_unlogged(True)
            try:
                return str(await self._execute("qom-get", {"path": path, "property": name}))
            finally:
                self._transport.keep_unlogged(False)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, *, out_of_band: bool = False
    ) -> Any:
        if self.closed:
            raise self._lost(command, sent=False)
        stall = min(self.stall, *self._patience) if self._silent and self._patience else self.stall
        try:
            async with asyncio.timeout(stall):
                answer = await self._transport.execute(command, arguments, out_of_band=out_of_band)
            self._silent = False
            return checked(command, answer)
        except CommandError:
            self._silent = False
            raise
        except TimeoutError:
            self._silent = True
            raise StalledError(
                f"QEMU did not answer {command} for {stall:g} s",
                standing="whether it will still be carried out is unknown",
                remedy="look whether the QEMU process is stopped or its storage hangs",
            ) from None
        except LostError as error:
            raise self._lost(command, why=error.why) from error

    async def disks_called(self) -> Mapping[str, str]:
        """Return the ids of the disks by a manager's names of them, whose monitor this is.

        :raise DisconnectedError: the connection was lost.
        """
        try:
            return await self._transport.disks_called()
        except LostError as error:
            raise self._lost(None, why=error.why) from error

    @property
    def is_lent(self) -> bool:
        """Whether a manager lends it that changes chains itself: by `through`."""
        return self._transport.lender is not None

    async def through(self, ask: Callable[[Lender], Awaitable[T]]) -> T:
        """Have the manager whose monitor this is do something.

        :raise DisconnectedError: the way to it was lost; the outcome is unknown.
        :raise Error: it refused; in its words. A BusyError: it is at work on this VM.
        """
        lender = self._transport.lender
        assert lender is not None, "ask `is_lent` first"
        try:
            return await ask(lender)
        except LostError as error:
            raise self._lost("what its manager was asked for", why=error.why) from error

    async def pass_fd(self, name: str, fd: int) -> None:
        """Hand a duplicate of `fd` to QEMU under `name` (the `getfd` command).

        QEMU holds it until `closefd`, also when this connection ends. A name must never be
        used twice: a second `getfd` of one name closes the first file (K1).

        :raise UnsupportedError: the monitor is not on a UNIX socket.
        :raise CommandError: QEMU refused.
        """
        if not self.can_pass_fds:
            raise UnsupportedError(f"{self.address} cannot pass file descriptors: it is not UNIX")
        async with self._turn:
            # Replies come in order, so after this one nothing of an earlier, cancelled command
            # is still waiting to be written, and the descriptor cannot land inside it.
            await self._execute("query-version", None)
            try:
                self._transport.send_fd(fd)
            except LostError as error:
                raise self._lost("getfd", why=error.why) from error
            await self._execute("getfd", {"fdname": name})

    def subscribe(self, *names: str, match: Callable[[Event], bool] | None = None) -> Subscription:
        """Listen, from now on, for events of these names (none given: all).

        Subscribe before sending the command whose events are wanted: they may come before
        its reply (F5).

        :param match: a further condition on the whole event.
        """
        subscription = Subscription(self, frozenset(names), match)
        self._subscriptions.add(subscription)
        return subscription

    def _on_event(self, event: Event, size: int) -> None:
        for subscription in tuple(self._subscriptions):
            subscription._put(event, size)

    def _on_end(self) -> None:
        self.closed = True
        for subscription in tuple(self._subscriptions):
            subscription._wake.set()

    def _lost(self, command: str | None, *, why: str = "", sent: bool = True) -> Error:
        why = self._transport.ended or why
        because = f" ({why})" if why else ""
        if command is None or not sent:
            return DisconnectedError(f"the connection to {self.address} is closed{because}")
        return DisconnectedError(
            f"the connection to {self.address} was lost during {command}{because}",
            command=command,
            standing="whether QEMU carried it out is unknown",
            remedy="look whether QEMU still runs; if it does, connect again and query",
        )
