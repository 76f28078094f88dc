"""A QMP connection by a socket: what carries a `Monitor` to a QEMU that listens for it.

The only module that imports qemu.qmp. It adds what a controller that may not fail needs:

- a limit on the greeting: a monitor that another client holds accepts the connection and
  then says nothing (F15);
- messages that are bounded (`qmpblock.peerjson`), and events that nobody keeps: qemu.qmp's
  default listener keeps every one for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Never

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError as _QMPConnectError
from qemu.qmp.protocol import StateError

from qmpblock.address import Address, IncusAddress, ProxmoxAddress, SSHAddress, UnixAddress
from qmpblock.cancellation import undisturbed
from qmpblock.errors import CommandError, ConnectError, GreetingError, MonitorHeldError, printable
from qmpblock.host.forward import Forward
from qmpblock.host.processes import Peer, describe_process
from qmpblock.host.socketholders import holders
from qmpblock.managers import Manager
from qmpblock.peerjson import MOST_BYTES, MOST_VALUES, RefusedError, read_json
from qmpblock.qemu.transport import Event, LostError
from qmpblock.sockets import open_socket

__all__ = ["QMPSocket"]

# Without a handler of the application's, qemu.qmp's errors would be printed on stderr by
# logging's last resort; they all reach the caller as exceptions.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_READ_LIMIT = MOST_BYTES  # of one message
_AT_ONCE = 128  # messages or lines that are read before anything else has its turn
_SECOND_MONITOR = """\
give this VM a second monitor and use that: add the option
  -qmp unix:/run/qmpblock/VM.qmp,server=on,wait=off
to QEMU. Under libvirt none is needed: give libvirt:DOMAIN as the address"""


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


class QMPSocket:
    """A `Transport`: one QMP connection, by a socket or by ssh to one."""

    def __init__(
        self,
        address: Address | SSHAddress,
        on_event: Callable[[Event, int], None],
        on_end: Callable[[], None],
    ) -> None:
        self._address = address
        self._client = _Client(on_event, on_end)
        self.peer: Peer | None = None  # that made the listening socket, where it is of this host
        self.forward: Forward | None = None
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.package = ""

    @property
    def can_pass_fds(self) -> bool:
        """Whether it is a UNIX socket of this host."""
        return isinstance(self._address, UnixAddress)

    @property
    def peer_pid(self) -> int | None:
        """The process that made the listening socket: QEMU, or a manager. None: not known."""
        return None if self.peer is None else self.peer.known()

    @property
    def ended(self) -> str:
        """What ssh said when it ended, if it did."""
        if self.forward is None or not self.forward.ended:
            return ""
        return f"ssh has ended: {self.forward.said or 'it does not say why'}"

    async def open(self, timeout: float, stall: float) -> None:
        """Connect, wait for the greeting, negotiate. See `Monitor.connect`."""
        if isinstance(self._address, SSHAddress):
            self.forward = await Forward.open(self._address)
        try:
            await self._begin(timeout)
        except BaseException as error:
            if self._client.greeting is not None:
                await self.close(stall)
            if self.forward is not None:
                await undisturbed(self.forward.close())
                if self.forward.said and isinstance(error, GreetingError):
                    error.remedy = f"ssh says: {self.forward.said}"
            raise

    async def _begin(self, greeting_timeout: float) -> None:
        where = self._address
        sock = await _connect_socket(where, self.forward, greeting_timeout)
        try:
            await _await_greeting(sock, where, greeting_timeout)
            if isinstance(where, UnixAddress):
                self.peer = Peer.of(sock)
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
                f"the greeting of {self._address} names no QEMU version: "
                f"{printable(greeting._raw)}",
                remedy="a guest agent or a storage daemon may answer there; "
                "give the address of a QEMU system emulator's monitor",
            ) from None

    async def close(self, stall: float) -> None:
        """Disconnect. A peer that does not read what was sent is given as long as a command."""
        # disconnect() raises what ended the reader (EOF, a reset): the caller has seen it, or
        # no longer wants to know.
        try:
            with contextlib.suppress(EOFError, OSError, QMPError):  # TimeoutError is an OSError
                async with asyncio.timeout(stall):
                    await self._client.disconnect()
        finally:
            if self.forward is not None:
                await undisturbed(self.forward.close())

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        out_of_band: bool = False,
    ) -> Any:
        """Run a command; see `Transport`."""
        try:
            return await self._client.execute(command, arguments, oob=out_of_band)
        except ExecuteError as error:
            response = error.error.error
            raise CommandError(command, arguments, response.class_, response.desc) from None
        except TimeoutError:
            raise
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise LostError(self._client.broken) from error
        except QMPError as error:
            raise LostError(printable(error)) from error

    def send_fd(self, fd: int) -> None:
        """Send a descriptor ahead of the next command."""
        try:
            self._client.send_fd_scm(fd)
        except (OSError, QMPError) as error:
            raise LostError(printable(error)) from error

    lender = None
    by_turns = False

    async def disks_called(self) -> Mapping[str, str]:
        """Nothing: QEMU's own names are all that there are."""
        return {}

    def keep_turn(self, kept: bool) -> None:
        """Nothing: nobody else has this connection."""

    def keep_unlogged(self, unlogged: bool) -> None:
        """Have no log show what is sent and read from now on."""
        self._client.unlogged = unlogged


async def _connect_socket(
    address: Address | SSHAddress, forward: Forward | None, timeout: float
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
        if isinstance(address, IncusAddress) and not isinstance(error, PermissionError):
            raise ConnectError(
                f"the instance {address.instance} has no monitor at {address.path}: "
                f"{error.strerror or error}",
                remedy=f"look whether it runs; Incus holds the monitor that it has, so give it one "
                f"more: {Manager('Incus', address.instance, '').monitor_to_add()}; then stop it, "
                "and start it again",
            ) from None
        if isinstance(address, ProxmoxAddress) and not isinstance(error, PermissionError):
            raise ConnectError(
                f"the VM {address.vmid} has no monitor at {address.path}: "
                f"{error.strerror or error}",
                remedy=f"look whether it runs on this host: qm status {address.vmid}",
            ) from None
        raise ConnectError(
            f"cannot connect to {address}: {error.strerror or error}",
            remedy="look whether the VM runs, and whether this is the path or port of its "
            "-qmp option and this user may use it",
        ) from None


async def _await_greeting(
    sock: socket.socket, address: Address | SSHAddress, timeout: float
) -> None:
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


def _held(address: Address | SSHAddress, what: str) -> MonitorHeldError:
    """Say which processes hold a monitor, where that can be seen."""
    pids = holders(address)
    remedy = _SECOND_MONITOR
    if isinstance(address, ProxmoxAddress):
        remedy = "wait for it to go, as all do that share this monitor, and run this again"
    if not pids:
        return MonitorHeldError(
            f"{what}. Most likely another client holds it; which, cannot be seen from here",
            remedy=remedy,
        )
    who = ", ".join(describe_process(pid) for pid in pids)
    return MonitorHeldError(
        f"{what}: it serves one client at a time, and that is {who}", pids, remedy=remedy
    )
