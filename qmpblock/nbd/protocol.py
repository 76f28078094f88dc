"""The NBD client protocol, without I/O: bytes in, events out, bytes to send out.

Four verbs, and a fifth pair that saves a copy::

    receive_data(data) / receive_eof()    what the network brought
    send_...()                            what the user wants
    events_received()                     what that led to
    data_to_send()                        what the network is to carry

    get_buffer() / buffer_updated(n)      in place of receive_data: the network writes where
                                          the bytes belong, a read's data into their buffer

Nothing here raises because of what a server sent: the first violation, refusal or end of
the stream becomes `failure`, and from then on the connection is dead and bytes are dropped.
`send_...()` raise RequestError for requests that may not be sent, and send nothing then.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from qmpblock.errors import (
    Error,
    NBDConnectError,
    NBDDisconnectedError,
    NBDProtocolError,
)
from qmpblock.nbd import wire
from qmpblock.nbd.handshake import Handshake, State, Wanted, not_nbd
from qmpblock.nbd.session import Session
from qmpblock.nbd.transmission import Finished, Transmission
from qmpblock.nbd.wire import Command, CommandFlag

__all__ = ["Event", "Finished", "Listed", "Opened", "Protocol", "StartTLS", "State", "Wanted"]

_SCRATCH = 64 << 10  # bytes; the most that small replies are read ahead by


@dataclass(frozen=True)
class StartTLS:
    """Shake hands for TLS now, then call `tls_started`; carry no plaintext any more."""


@dataclass(frozen=True)
class Opened:
    """The export is open: requests may be sent."""

    session: Session


@dataclass(frozen=True)
class Listed:
    """The metadata contexts that the server offers for the export; nothing else will come."""

    contexts: tuple[str, ...]


Event = StartTLS | Opened | Listed | Finished


class _Inbox:
    """Where received bytes land: small pieces in a scratch buffer, payloads where they belong.

    A piece that the parser wants is either a number of bytes, shown to it in the scratch
    buffer and valid until it asks for the next, or a buffer of its own to be filled.
    """

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._start = self._end = 0
        self._target: memoryview | None = None
        self._filled = 0

    @property
    def waiting(self) -> int:
        """Bytes received that the parser has not seen."""
        return self._end - self._start

    def want(self, piece: memoryview) -> None:
        """Fill `piece` next, with what is here and then directly."""
        self._target = piece
        self._filled = min(self.waiting, len(piece))
        piece[: self._filled] = self._scratch[self._start : self._start + self._filled]
        self._start += self._filled

    def filled(self) -> memoryview | None:
        """Return the wanted buffer once it is full."""
        target = self._target
        if target is None or self._filled < len(target):
            return None
        self._target = None
        return target

    def take(self, length: int) -> memoryview | None:
        """Return the next `length` bytes of the scratch buffer once they are there."""
        if self.waiting < length:
            return None
        self._start += length
        return self._scratch[self._start - length : self._start]

    def get_buffer(self) -> memoryview:
        """Return where the next bytes are to be written, never empty."""
        if self._target is not None:
            return self._target[self._filled :]
        if self._start:  # what the parser was shown, it has left behind
            left = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(left)] = left
            self._start, self._end = 0, len(left)
        return self._scratch[self._end :]

    def written(self, length: int) -> None:
        """Note that `length` bytes were written to `get_buffer()`."""
        if self._target is not None:
            self._filled += length
        else:
            self._end += length

    def peek(self, length: int) -> bytes:
        """Return at most `length` of the waiting bytes, and leave them."""
        return bytes(self._scratch[self._start : min(self._end, self._start + length)])


class Protocol:
    """One connection to an NBD server.

    :param wanted: what the handshake is to reach.
    :param polite: whether to take leave of the server, with ABORT or DISC. False is for a
        connection under custody (K1): nothing is ever sent but requests.
    :ivar failure: why the connection is dead, or None.
    :ivar received: how many bytes were taken from the server, deciphered.
    """

    def __init__(self, wanted: Wanted, *, polite: bool = True) -> None:
        self.failure: Error | None = None
        self.received = 0
        self._polite = polite
        self._handshake = Handshake(wanted)
        self._transmission: Transmission | None = None
        self._inbox = _Inbox()
        self._events: list[Event] = []
        self._told_tls = False
        self._left = False  # DISC or ABORT was sent, or would have been if we were polite
        self._shutting_down = False
        self._parser: Generator[int | memoryview, memoryview, None] = self._parse()
        self._need: int | memoryview = next(self._parser)

    @property
    def state(self) -> State:
        """Where the handshake stands; READY from its end on."""
        return self._handshake.state

    @property
    def session(self) -> Session:
        """What the handshake settled.

        :raise NBDConnectError: it is not over.
        """
        if self._transmission is None:
            raise NBDConnectError("the NBD handshake is not over")
        return self._transmission.session

    @property
    def in_flight(self) -> int:
        """How many requests have no complete reply yet, those nobody waits for included."""
        return self._transmission.in_flight if self._transmission else 0

    # -- receiving

    def get_buffer(self) -> memoryview:
        """Return where to write the next bytes from the network; never empty."""
        return self._inbox.get_buffer()

    def buffer_updated(self, length: int) -> None:
        """Take `length` bytes that were written to the start of `get_buffer()`."""
        if self.failure is not None or self._left:
            return  # dropped: the next bytes overwrite them
        self.received += length
        self._inbox.written(length)
        self._run()

    def receive_data(self, data: wire.Bytes) -> None:
        """Take bytes from the network, in pieces of any size."""
        rest = memoryview(data)
        while len(rest) and self.failure is None and not self._left:
            buffer = self.get_buffer()
            length = min(len(buffer), len(rest))
            buffer[:length] = rest[:length]
            self.buffer_updated(length)
            rest = rest[length:]

    def receive_eof(self) -> None:
        """Take note that the server has closed its side."""
        if self.failure is not None or self._left:
            return
        if self._transmission is None:
            said = self._inbox.peek(8)
            if self.state is State.GREETING and said and not wire.NBDMAGIC.startswith(said):
                self.failure = not_nbd(said)
                return
            self.failure = NBDConnectError(
                f"the NBD server closed the connection while we awaited {self.state.value}"
            )
        elif self.in_flight:
            self.failure = NBDDisconnectedError(
                f"the NBD server closed the connection with {self.in_flight} requests in flight",
                standing="whether it carried those out is unknown",
            )
        else:
            self.failure = NBDDisconnectedError("the NBD server closed the connection")

    def events_received(self) -> list[Event]:
        """Return what happened since the last call."""
        if self._transmission is not None:
            self._events += self._transmission.finished
            self._transmission.finished.clear()
        events, self._events = self._events, []
        return events

    # -- sending

    def data_to_send(self) -> list[wire.Bytes]:
        """Return what to write to the network, in order, since the last call."""
        out = self._handshake.out
        self._handshake.out = []
        if self._transmission is not None:
            out += self._transmission.out
            self._transmission.out = []
        return out

    def tls_started(self) -> None:
        """Go on under TLS, the handshake done and the server's certificate accepted."""
        self._handshake.tls_started()

    def send_read(
        self, offset: int, into: memoryview, flags: CommandFlag = CommandFlag.NONE
    ) -> int:
        """Ask for `len(into)` bytes, which land in `into`; return the request's cookie.

        :raise RequestError: see `Session.check`.
        :raise NBDError: the connection is dead.
        """
        return self._alive().read(offset, into, flags)

    def send_write(
        self, offset: int, data: wire.Bytes, flags: CommandFlag = CommandFlag.NONE
    ) -> int:
        """Write; `data` must not change until it has left; return the request's cookie.

        :raise RequestError: see `Session.check`.
        :raise NBDError: the connection is dead.
        """
        return self._alive().write(offset, data, flags)

    def send_block_status(
        self, offset: int, length: int, flags: CommandFlag = CommandFlag.NONE
    ) -> int:
        """Ask for the extents of every negotiated context; return the request's cookie.

        :raise RequestError: see `Session.check`.
        :raise NBDError: the connection is dead.
        """
        return self._alive().block_status(offset, length, flags)

    def send_command(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: CommandFlag = CommandFlag.NONE,
    ) -> int:
        """Send FLUSH, TRIM, CACHE or WRITE_ZEROES; return the request's cookie.

        :raise RequestError: see `Session.check`.
        :raise NBDError: the connection is dead.
        """
        assert command in (Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES)
        return self._alive().plain(command, offset, length, flags)

    def send_leave(self) -> bool:
        """Take leave, if polite: DISC in transmission. What comes after is dropped.

        :return: whether the server was told, and will thus close the connection.
        """
        told = self._polite and self._transmission is not None and self.failure is None
        if told and not self._left:
            assert self._transmission is not None
            self._transmission.disconnect()
        self._left = True
        return told

    def _alive(self) -> Transmission:
        if self.failure is not None or self._left:
            raise self.dead()
        if self._shutting_down:
            raise NBDDisconnectedError("the NBD server is shutting down and takes no more requests")
        if self._transmission is None:
            raise NBDConnectError("the NBD handshake is not over")
        return self._transmission

    def dead(self) -> Error:
        """Make a new exception that says why the connection is dead.

        New, because one exception raised in many tasks would mix their tracebacks.
        """
        failure = self.failure
        if failure is None:
            return NBDDisconnectedError("the NBD connection was closed by us")
        return type(failure)(failure.message, standing=failure.standing, remedy=failure.remedy)

    # -- parsing

    def _parse(self) -> Generator[int | memoryview, memoryview, None]:
        yield from self._handshake.parse()
        if self.state is State.LISTED:
            self._events.append(Listed(self._handshake.listed))
            self._abort()
            return
        assert self._handshake.session is not None
        self._transmission = Transmission(self._handshake.session)
        self._events.append(Opened(self._handshake.session))
        yield from self._transmission.parse()

    def _run(self) -> None:
        """Give the parser what it wants, as long as it is there."""
        try:
            while (piece := self._piece()) is not None:
                self._need = self._parser.send(piece)
                if isinstance(self._need, memoryview):
                    self._inbox.want(self._need)
        except StopIteration:
            self._left = True
        except Error as error:
            self._fail(error)
        self._notice()

    def _piece(self) -> memoryview | None:
        if self.state is State.TLS:
            # What arrives under TLS comes after tls_started(). This did not: an attacker
            # may have put it there, to be taken for the server's protected words.
            if self._inbox.waiting:
                raise NBDProtocolError(
                    "bytes came in plaintext between STARTTLS and the TLS handshake: "
                    "somebody may be tampering with the connection"
                )
            return None
        if isinstance(self._need, memoryview):
            return self._inbox.filled()
        return self._inbox.take(self._need)

    def _fail(self, error: Error) -> None:
        self.failure = error
        refused = not isinstance(error, NBDProtocolError) and self._handshake.haggling
        if refused:
            self._abort()

    def _abort(self) -> None:
        """End the handshake in an orderly way, if polite: a soft disconnect."""
        if self._polite:
            self._handshake.out.append(wire.encode_option(wire.Option.ABORT))

    def _notice(self) -> None:
        if self.state is State.TLS and not self._told_tls and self.failure is None:
            self._told_tls = True
            self._events.append(StartTLS())
        if self._transmission is not None and any(
            f.error is not None and f.error.errno == wire.ESHUTDOWN
            for f in self._transmission.finished
        ):
            self._shutting_down = True
