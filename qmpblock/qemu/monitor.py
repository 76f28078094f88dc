"""Monitor: one QMP connection to a running QEMU.

The only module that imports qemu.qmp. It adds what a controller that may not fail needs:

- a limit on the greeting: a monitor that another client holds accepts the connection and
  then says nothing (F15);
- every failure as one of `qmpblock.errors`, with the command, its arguments and QEMU's words;
- event subscriptions that exist before the command that causes the event is sent, and that
  are bounded: qemu.qmp's default listener keeps every event for ever;
- messages that are bounded (`qmpblock.peerjson`), and answers that are what they should be
  (`qmpblock.qemu.answers`): whoever has QEMU may answer as he likes;
- a lost connection that says so: whether the command was carried out is then unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Never, Self

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError as _QMPConnectError
from qemu.qmp.protocol import StateError

from qmpblock.address import MonitorAddress, SSHAddress, UnixAddress, parse_monitor
from qmpblock.cancellation import undisturbed
from qmpblock.errors import (
    CommandError,
    ConnectError,
    DisconnectedError,
    Error,
    GreetingError,
    MonitorHeldError,
    StalledError,
    UnsupportedError,
    printable,
)
from qmpblock.host.forward import Forward
from qmpblock.host.processes import Peer, describe_process
from qmpblock.host.socketholders import holders
from qmpblock.peerjson import MOST_BYTES, MOST_VALUES, RefusedError, read_json
from qmpblock.qemu.answers import checked
from qmpblock.sockets import open_socket

__all__ = ["Event", "Monitor", "Subscription"]

Event = Mapping[str, Any]

# Without a handler of the application's, qemu.qmp's errors would be printed on stderr by
# logging's last resort; they all reach the caller as exceptions.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_READ_LIMIT = MOST_BYTES  # of one message
_QUEUE_LIMIT = 4096  # events kept for one subscription that nobody reads
_QUEUE_BYTES = 4 << 20  # and how long they may be together; QEMU's have some hundred
_AT_ONCE = 128  # messages or lines that are read before anything else has its turn
_SECOND_MONITOR = """\
give this VM a second monitor and use that: add the option
  -qmp unix:/run/qmpblock/VM.qmp,server=on,wait=off
to QEMU, or, under libvirt, to the domain's XML:
  <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    ...
    <qemu:commandline>
      <qemu:arg value='-qmp'/>
      <qemu:arg value='unix:/run/qmpblock/VM.qmp,server=on,wait=off'/>
    </qemu:commandline>
  </domain>
There QEMU must be able to make the socket; once, as root (its user is qemu on Fedora):
  echo 'd /run/qmpblock 0700 libvirt-qemu root -' > /etc/tmpfiles.d/qmpblock.conf
  systemd-tmpfiles --create qmpblock.conf"""


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


class _Client(QMPClient):
    """qemu.qmp's client with its event dispatch replaced, so that nothing accumulates.

    And without writing out every message for its log, whether or not anybody reads that: it
    took a third of the time of a short command.
    """

    def __init__(self, on_event: Callable[[Event, int], None], on_end: Callable[[], None]) -> None:
        super().__init__(readbuflen=_READ_LIMIT)
        self._deliver_event = on_event
        self._deliver_end = on_end
        self._read = 0  # lines
        self._size = 0  # bytes of the last message
        self.unlogged = False
        self._negotiates = False
        self._greeted = False
        self.broken = ""  # how the peer broke the protocol

    @classmethod
    def make_execute_msg(
        cls, cmd: str, arguments: Mapping[str, object] | None = None, oob: bool = False
    ) -> Message:
        """Make a command, which is written out when it is sent, and not here too."""
        words: dict[str, object] = {"exec-oob" if oob else "execute": cmd}
        if arguments is not None:
            words["arguments"] = arguments
        return Message(words, eager=False)

    def _get_exec_id(self) -> str:
        # QEMU takes a command in byte by byte, 8 us each, and a copy sends a hundred of them.
        self._execute_id += 1
        return str(self._execute_id)

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self._is_logged() else msg

    def _cb_inbound(self, msg: Message) -> Message:
        logged = self._is_logged() and self._is_awaited(msg)
        return super()._cb_inbound(msg) if logged else msg

    async def _on_message(self, msg: Message) -> None:
        if self._is_awaited(msg):
            await super()._on_message(msg)

    def _is_awaited(self, msg: Message) -> bool:
        """Whether somebody still wants a reply: if not, it may be a key, which no log may have."""
        return "event" in msg or "id" not in msg or msg["id"] in list(self._pending)

    def _is_logged(self) -> bool:
        return not self.unlogged and self.logger.isEnabledFor(logging.DEBUG)

    async def _negotiate(self) -> None:
        self._negotiates = True
        try:
            await super()._negotiate()
        finally:
            self._negotiates = False

    async def _do_recv(self) -> Message:
        # The base class takes the first message for the greeting, and the next for the answer to
        # qmp_capabilities; an event may come before either, and what QEMU still had to answer to a
        # client that was killed (F22).
        while True:
            message = await self._next()
            awaited = self._negotiates or not self._greeted
            if not awaited or not ("event" in message or message.get("id") is not None):
                self._greeted = True
                return message
            await self._event_dispatch(message)

    async def _next(self) -> Message:
        data = await self._readline()
        self._size = len(data)
        try:
            message = read_json(data)
        except RefusedError as error:
            self._break(str(error))
        if not isinstance(message, dict):
            self._break("it is no object")
        return Message(message, eager=False)

    def _break(self, why: str) -> Never:
        self.broken = f"it sent what no QEMU sends: {printable(why)}"
        raise QMPError(self.broken)

    async def _readline(self) -> bytes:
        """Read one message: a line; of a monitor with pretty=on, the lines from `{` to `}`."""
        line = await self._one_line()
        if line.rstrip() != b"{":
            return line
        message, lines = bytearray(line), 1
        while line.rstrip(b"\r\n") != b"}":  # those of inner objects are indented
            line = await self._one_line()
            message += line
            lines += 1
            if len(message) > _READ_LIMIT or lines > MOST_VALUES:
                self._break(f"it has more than {_READ_LIMIT} bytes or {MOST_VALUES} lines")
        return bytes(message)

    async def _one_line(self) -> bytes:
        # What has come is read without a pause; many lines would keep all else, signals and time
        # limits included, from their turn.
        self._read += 1
        if self._read % _AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            return await super()._readline()
        except ValueError:  # asyncio's word for it
            self._break(f"it has more than {_READ_LIMIT} bytes")

    async def _event_dispatch(self, msg: Message) -> None:
        if isinstance(msg.get("event"), str) and isinstance(msg.get("data", {}), dict):
            self._deliver_event({"data": {}, **msg}, self._size)

    async def _bh_disconnect(self) -> None:
        try:
            await super()._bh_disconnect()
        finally:
            self._deliver_end()


class Monitor:
    """A QMP connection. Make one with `connect`; `async with` closes it.

    Commands run one after the other, as they do inside QEMU.

    :ivar forward: the ssh by which it goes to another host; None where it does not.
    """

    def __init__(self, address: MonitorAddress, stall: float) -> None:
        self.address = address
        self.forward: Forward | None = None
        self.stall = stall
        self._peer: Peer | None = None
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.package = ""
        self.closed = False
        self._client = _Client(self._on_event, self._on_end)
        self._subscriptions: set[Subscription] = set()
        self._turn = asyncio.Lock()

    @property
    def peer_pid(self) -> int | None:
        """The process that made the listening socket: QEMU, or a manager. None: not known."""
        return None if self._peer is None else self._peer.known()

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
        if isinstance(where, SSHAddress):
            monitor.forward = await Forward.open(where)
        try:
            await monitor._begin(greeting_timeout)
        except BaseException as error:
            if monitor._client.greeting is not None:
                await monitor.close()
            if monitor.forward is not None:
                await undisturbed(monitor.forward.close())
                if monitor.forward.said and isinstance(error, GreetingError):
                    error.remedy = f"ssh says: {monitor.forward.said}"
            raise
        return monitor

    async def _begin(self, greeting_timeout: float) -> None:
        where = self.address
        sock = await _connect_socket(where, self.forward, greeting_timeout)
        try:
            await _await_greeting(sock, where, greeting_timeout)
            if isinstance(where, UnixAddress):
                self._peer = Peer.of(sock)
            async with asyncio.timeout(greeting_timeout):
                await self._client.connect(sock)
        except TimeoutError:
            raise GreetingError(
                f"{where} began a greeting but did not complete it within {greeting_timeout:g} s"
            ) from None
        except _QMPConnectError as error:
            raise GreetingError(
                f"what answers at {where} is not a QMP monitor: "
                f"{self._client.broken or printable(error)}",
                remedy="give the address of a QMP monitor (-qmp, or -mon mode=control), "
                "not of a human monitor, a serial console or an agent",
            ) from error
        finally:
            if self._client.greeting is None:
                sock.close()
        self._read_greeting()

    def _read_greeting(self) -> None:
        greeting = self._client.greeting
        assert greeting is not None  # connect() succeeded
        try:
            version = greeting._raw["QMP"]["version"]
            qemu = version["qemu"]
            major, minor, micro = (int(qemu[part]) for part in ("major", "minor", "micro"))
            self.version = (major, minor, micro)
            self.package = str(version.get("package", ""))
        except (KeyError, TypeError, ValueError):
            raise GreetingError(
                f"the greeting of {self.address} names no QEMU version: {printable(greeting._raw)}",
                remedy="a guest agent or a storage daemon may answer there; "
                "give the address of a QEMU system emulator's monitor",
            ) from None

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
        # disconnect() raises what ended the reader (EOF, a reset): the caller has seen it, or
        # no longer wants to know.
        try:
            with contextlib.suppress(EOFError, OSError, QMPError):  # TimeoutError is an OSError
                async with asyncio.timeout(self.stall):
                    await self._client.disconnect()
        finally:
            if self.forward is not None:
                await undisturbed(self.forward.close())

    @property
    def can_pass_fds(self) -> bool:
        """Whether file descriptors can be handed to QEMU (UNIX sockets only)."""
        return isinstance(self.address, UnixAddress)

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
            self._client.unlogged = True
            try:
                return str(await self._execute("qom-get", {"path": path, "property": name}))
            finally:
                self._client.unlogged = False

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, *, out_of_band: bool = False
    ) -> Any:
        if self.closed:
            raise self._lost(command, sent=False)
        try:
            async with asyncio.timeout(self.stall):
                answer = await self._client.execute(command, arguments, oob=out_of_band)
            return checked(command, answer)
        except ExecuteError as error:
            response = error.error.error
            raise CommandError(command, arguments, response.class_, response.desc) from None
        except TimeoutError:
            raise StalledError(
                f"QEMU did not answer {command} for {self.stall:g} s",
                standing="whether it will still be carried out is unknown",
                remedy="look whether the QEMU process is stopped or its storage hangs",
            ) from None
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise self._lost(command, why=self._client.broken) from error
        except QMPError as error:
            raise self._lost(command, why=printable(error)) from error

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
                self._client.send_fd_scm(fd)
            except (OSError, QMPError) as error:
                raise self._lost("getfd", why=printable(error)) from error
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
        if self.forward is not None and self.forward.ended:
            why = f"ssh has ended: {self.forward.said or 'it does not say why'}"
        because = f" ({why})" if why else ""
        if command is None or not sent:
            return DisconnectedError(f"the connection to {self.address} is closed{because}")
        return DisconnectedError(
            f"the connection to {self.address} was lost during {command}{because}",
            command=command,
            standing="whether QEMU carried it out is unknown",
            remedy="look whether QEMU still runs; if it does, connect again and query",
        )


async def _connect_socket(
    address: MonitorAddress, forward: Forward | None, timeout: float
) -> socket.socket:
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, SSHAddress):
                assert forward is not None  # it was opened for that
                return await open_socket(forward.monitor.here)
            return await open_socket(address)
    except TimeoutError:
        if isinstance(address, UnixAddress):  # which connects at once, or has no room in its queue
            raise _held(
                address,
                f"{address} did not take a connection within {timeout:g} s: its queue is full, and "
                "so many clients wait for the one that holds this monitor",
            ) from None
        raise ConnectError(f"{address} did not accept a connection within {timeout:g} s") from None
    except OSError as error:
        raise ConnectError(
            f"cannot connect to {address}: {error.strerror or error}",
            remedy="look whether the VM runs, and whether this is the path or port of its "
            "-qmp option and this user may use it",
        ) from None


async def _await_greeting(sock: socket.socket, address: MonitorAddress, timeout: float) -> None:
    """Wait until the peer speaks, and look at its first byte without consuming it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        async with asyncio.timeout(timeout):
            await readable.wait()
    except TimeoutError:
        raise _held(
            address,
            f"{address} accepted the connection but sent no greeting within {timeout:g} s",
        ) from None
    finally:
        loop.remove_reader(sock)
    try:
        begin = sock.recv(64, socket.MSG_PEEK)
    except OSError as error:
        raise GreetingError(f"{address} broke the connection: {error.strerror}") from None
    if not begin:
        raise GreetingError(f"{address} closed the connection without a greeting")
    if not begin.lstrip().startswith(b"{"):
        raise GreetingError(
            f"what answers at {address} is not a QMP monitor: it began with "
            f"{printable(begin.decode('latin-1'))!r}",
            remedy="give the address of a QMP monitor (-qmp, or -mon mode=control)",
        )


def _held(address: MonitorAddress, what: str) -> MonitorHeldError:
    """Say which processes hold a monitor, where that can be seen."""
    pids = holders(address)
    if not pids:
        return MonitorHeldError(
            f"{what}. Most likely another client holds it; which, cannot be seen from here",
            remedy=_SECOND_MONITOR,
        )
    who = ", ".join(describe_process(pid) for pid in pids)
    return MonitorHeldError(
        f"{what}: it serves one client at a time, and that is {who}", pids, remedy=_SECOND_MONITOR
    )
