"""Client: one connection to an NBD export, many requests in flight.

Usable alone::

    async with await Client.connect("/run/nbd", export="vd0", contexts=["base:allocation"]) as nbd:
        extents = (await nbd.block_status(0, nbd.size))["base:allocation"]
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmpblock.address import Address, TCPAddress, parse_address
from qmpblock.errors import Error, NBDDisconnectedError
from qmpblock.nbd.link import Link, connect
from qmpblock.nbd.protocol import Event, Finished, Listed, Opened, Protocol, Wanted
from qmpblock.nbd.session import Session
from qmpblock.nbd.wire import (
    BlockSizes,
    Command,
    CommandFlag,
    HeaderStyle,
    TransmissionFlag,
)

if TYPE_CHECKING:
    import ssl

    import numpy as np
    from numpy.typing import NDArray

    from qmpblock.nbd.tls import TLSLayer

__all__ = ["Client"]

_PATIENCE = 5.0  # seconds that a server has to hang up after DISC
_WINDOW = 4  # pieces in flight of one long read or write: enough to hide the round trip


class Client:
    """An open NBD export. Made by `connect`; an async context manager, which closes it.

    Failures are of two kinds. NBDRequestError: the server failed this one request, and the
    connection lives on. NBDProtocolError, NBDDisconnectedError, StalledError: the connection
    is dead, this request and all others in flight fail, and whether the server carried them
    out is unknown.

    Cancelling a request leaves the connection usable, but what was sent is not taken back:
    a cancelled write may be carried out, now or later. Its late reply is checked and dropped.
    Until then it keeps its place among the requests in flight (and a read its buffer), so
    cancelling cannot make memory grow: at most `in_flight` requests of at most
    32 MiB are held.

    A request that is empty, unaligned to `block_size.minimum`, past the end, too long or not
    offered by the server raises RequestError (RangeError, UnsupportedError) and is not sent.
    """

    def __init__(
        self, protocol: Protocol, in_flight: int, polite: bool, stall: float, tls: TLSLayer | None
    ) -> None:
        self._protocol = protocol
        self._slots = asyncio.Semaphore(in_flight)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._greeted: asyncio.Future[Opened | Listed] = asyncio.get_running_loop().create_future()
        self._make_link = partial(
            Link,
            protocol,
            on_event=self._on_event,
            on_end=self._on_end,
            tls=tls,
            polite=polite,
            stall=stall,
        )
        self._stall = stall
        self._link: Link

    @classmethod
    async def connect(
        cls,
        address: str | Address | socket.socket,
        *,
        export: str = "",
        contexts: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        tls_hostname: str | None = None,
        polite: bool = True,
        stall: float = 60.0,
        in_flight: int = 16,
    ) -> Client:
        """Connect and open an export.

        Cancelling closes the socket.

        :param address: where the server listens, or a connected stream socket. The socket is
            the client's from now on, and closed with it or when this fails.
        :param export: its name; empty for the server's default.
        :param contexts: metadata contexts to ask for (`base:allocation`,
            `qemu:allocation-depth`, ...). The server may know only some: see `contexts`.
        :param tls: insist on TLS, with these credentials (see `tls_context`).
        :param tls_hostname: whom the server's certificate must name; the host of a TCP
            address if not given.
        :param polite: False is custody (K1): a duplicate of this socket is held by
            QEMU, which must never see the stream end. Then nothing is ever sent but options
            and requests: no DISC, no ABORT, no TLS alert or close_notify, no shutdown(2),
            whatever happens; the end is close(2).
        :param stall: seconds without any movement, while something is awaited, that end the
            connection. In the handshake each step must end within it.
        :param in_flight: how many requests may be in flight; further ones wait.
        :raise NBDConnectError: nothing listens, it is no NBD server, or it refused.
        :raise NBDProtocolError: the server broke the protocol.
        :raise StalledError: the server said nothing for too long.
        :raise UnsupportedError: contexts were wanted, and the server cannot have any.
        :raise RequestError: a name or address is not usable, or `tls_hostname` is missing.
        """
        client = await cls._greet(
            address,
            partial(Wanted, export, tuple(contexts)),
            tls,
            tls_hostname,
            polite=polite,
            stall=stall,
            in_flight=in_flight,
        )
        assert isinstance(client._greeted.result(), Opened)
        return client

    @classmethod
    async def list_contexts(
        cls,
        address: str | Address | socket.socket,
        *,
        export: str = "",
        queries: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        tls_hostname: str | None = None,
        stall: float = 60.0,
    ) -> tuple[str, ...]:
        """Ask which metadata contexts an export has, on a connection of its own.

        :param queries: `NAMESPACE:` or full names (`qemu:dirty-bitmap:`); none means all.
        :raise Error: as `connect`.
        """
        client = await cls._greet(
            address,
            partial(Wanted, export, queries=tuple(queries)),
            tls,
            tls_hostname,
            polite=True,
            stall=stall,
            in_flight=1,
        )
        await client.close()
        listed = client._greeted.result()
        assert isinstance(listed, Listed)
        return listed.contexts

    @classmethod
    async def _greet(
        cls,
        address: str | Address | socket.socket,
        make_wanted: Callable[..., Wanted],
        tls: ssl.SSLContext | None,
        tls_hostname: str | None,
        *,
        polite: bool,
        stall: float,
        in_flight: int,
    ) -> Client:
        try:
            wanted = make_wanted(tls=tls is not None)
            where = parse_address(address) if isinstance(address, str) else address
            layer = _tls_layer(where, tls, tls_hostname)
        except BaseException:
            if isinstance(address, socket.socket):
                address.close()
            raise
        client = cls(Protocol(wanted, polite=polite), in_flight, polite, stall, layer)
        client._link = await connect(where, client._make_link, stall)
        try:
            await client._greeted
        except BaseException:
            client._link.kill(NBDDisconnectedError("the NBD handshake was given up"))
            raise
        return client

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
        """Close the connection; requests in flight fail with NBDDisconnectedError. Idempotent.

        Polite: DISC, and at most 5 seconds for the server to hang up. Otherwise close(2) at
        once. Cancelling skips the wait; the socket is closed all the same.
        """
        await self._link.close(min(_PATIENCE, self._stall))

    # -- what the server said

    @property
    def session(self) -> Session:
        """All that the handshake settled."""
        return self._protocol.session

    @property
    def export(self) -> str:
        """The name that the export was opened by."""
        return self.session.export

    @property
    def size(self) -> int:
        """Of the export, in bytes."""
        return self.session.size

    @property
    def block_size(self) -> BlockSizes:
        """Bytes: minimum (alignment of every request), preferred, maximum (payload)."""
        return self.session.block_sizes

    @property
    def max_status_length(self) -> int:
        """The longest BLOCK_STATUS, in bytes."""
        return self.session.limits.block_status

    @property
    def max_cache_length(self) -> int:
        """The longest CACHE, in bytes: at most 32 MiB."""
        return self.session.limits.cache

    @property
    def max_effect_length(self) -> int:
        """The longest WRITE_ZEROES and TRIM, in bytes."""
        return self.session.limits.effect

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that the server granted, in its order."""
        return tuple(self.session.contexts.values())

    @property
    def extended(self) -> bool:
        """Whether headers are extended: 64-bit lengths (QEMU since 8.2)."""
        return self.session.style is HeaderStyle.EXTENDED

    @property
    def read_only(self) -> bool:
        """Whether the export refuses writes. CACHE is not one."""
        return self.session.can(TransmissionFlag.READ_ONLY)

    @property
    def can_flush(self) -> bool:
        """Whether `flush` is offered."""
        return self.session.can(TransmissionFlag.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """Whether `fua=True` is offered."""
        return self.session.can(TransmissionFlag.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        """Whether `trim` is offered."""
        return self.session.can(TransmissionFlag.SEND_TRIM)

    @property
    def can_write_zeroes(self) -> bool:
        """Whether `write_zeroes` is offered."""
        return self.session.can(TransmissionFlag.SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        """Whether `write_zeroes(fast=True)` is offered."""
        return self.session.can(TransmissionFlag.SEND_FAST_ZERO)

    @property
    def can_df(self) -> bool:
        """Whether `read(unfragmented=True)` is offered."""
        return self.session.can(TransmissionFlag.SEND_DF)

    @property
    def can_cache(self) -> bool:
        """Whether `cache` is offered."""
        return self.session.can(TransmissionFlag.SEND_CACHE)

    @property
    def can_multi_conn(self) -> bool:
        """Whether what one connection flushed, all others see."""
        return self.session.can(TransmissionFlag.CAN_MULTI_CONN)

    # -- requests

    async def block_status(
        self, offset: int, length: int, *, one: bool = False
    ) -> Mapping[str, NDArray[np.uint64]]:
        """Ask for the extents from `offset` on, in every negotiated context.

        A server may answer for less than was asked, and for a different length in each
        context: go on from the end of the shortest. Each ends on a boundary of
        `block_size.minimum`, or at the end of the request.

        :param one: only the first extent of each context.
        :return: by context, an (n, 2) array of length in bytes and flags, n at least 1, every
            length at least 1, their sum at most `length`.
        :raise UnsupportedError: no context was negotiated.
        :raise RangeError: see the class; the limit is `max_status_length`.
        :raise NBDError: see the class.
        """
        flags = CommandFlag.REQ_ONE if one else CommandFlag.NONE
        self.session.check(Command.BLOCK_STATUS, offset, length, flags)
        extents: Mapping[str, NDArray[np.uint64]] = await self._request(
            lambda: self._protocol.send_block_status(offset, length, flags)
        )
        return extents

    async def read(self, offset: int, length: int, *, unfragmented: bool = False) -> bytearray:
        """Read; beyond `block_size.maximum` (or 32 MiB) in pieces, several in flight.

        :param unfragmented: make the server take each piece in one go (the DF flag); it may
            fail with EOVERFLOW if that is too much for it.
        :raise RequestError, NBDError: see the class.
        """
        flags = CommandFlag.DF if unfragmented else CommandFlag.NONE
        self.session.check_bounds(Command.READ, offset, length)
        self.session.check(Command.READ, offset, min(length, self.session.limits.payload), flags)
        data = bytearray(length)
        view = memoryview(data)
        await self._pieces(
            partial(self._protocol.send_read, offset + at, view[at:end], flags)
            for at, end in self._cut(length)
        )
        return data

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write; beyond `block_size.maximum` (or 32 MiB) in pieces, several in flight.

        A mutable buffer is copied first, so it may be changed at once, and a cancelled write
        sends only what it held when it was called. If this fails or is cancelled, any part
        of the range may have been written.

        :param fua: return only when the data are on stable storage.
        :raise RequestError, NBDError: see the class.
        """
        flags = CommandFlag.FUA if fua else CommandFlag.NONE
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        length = len(view)
        self.session.check_bounds(Command.WRITE, offset, length)
        self.session.check(Command.WRITE, offset, min(length, self.session.limits.payload), flags)
        await self._pieces(
            partial(self._protocol.send_write, offset + at, view[at:end], flags)
            for at, end in self._cut(length)
        )

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Make a range read as zeros, without sending them.

        :param no_hole: keep or make it allocated.
        :param fast: fail with ENOTSUP unless this is faster than writing the zeros.
        :param fua: return only when that is on stable storage.
        :raise RangeError: see the class; the limit is `max_effect_length`.
        :raise RequestError, NBDError: see the class.
        """
        flags = CommandFlag.FUA if fua else CommandFlag.NONE
        flags |= CommandFlag.NO_HOLE if no_hole else CommandFlag.NONE
        flags |= CommandFlag.FAST_ZERO if fast else CommandFlag.NONE
        await self._command(Command.WRITE_ZEROES, offset, length, flags)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that a range's contents are not needed; it then reads as anything.

        :raise RangeError: see the class; the limit is `max_effect_length`.
        :raise RequestError, NBDError: see the class.
        """
        flags = CommandFlag.FUA if fua else CommandFlag.NONE
        await self._command(Command.TRIM, offset, length, flags)

    async def cache(self, offset: int, length: int) -> None:
        """Tell the server that a range will be needed soon.

        On a QEMU export with copy-on-read this copies the range into the active layer.

        :raise RangeError: see the class; the limit is `max_cache_length`.
        :raise RequestError, NBDError: see the class.
        """
        await self._command(Command.CACHE, offset, length, CommandFlag.NONE)

    async def flush(self) -> None:
        """Put every write that has ended on stable storage.

        :raise UnsupportedError: the server has no FLUSH.
        :raise NBDError: see the class.
        """
        await self._command(Command.FLUSH, 0, 0, CommandFlag.NONE)

    # -- in flight

    async def _command(
        self, command: Command, offset: int, length: int, flags: CommandFlag
    ) -> None:
        self.session.check(command, offset, length, flags)
        await self._request(lambda: self._protocol.send_command(command, offset, length, flags))

    async def _request(self, send: Callable[[], int]) -> Any:
        return await (await self._start(send))

    async def _start(self, send: Callable[[], int]) -> asyncio.Future[Any]:
        """Send a request as soon as it may be; return the future of its result."""
        await self._slots.acquire()
        try:
            await self._link.drain()
            cookie = send()
        except BaseException:
            self._slots.release()
            raise
        future = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = future
        self._link.flush()
        return future

    def _cut(self, length: int) -> Iterator[tuple[int, int]]:
        """Cut a payload to what one request may carry: begin and end of each piece."""
        step = self.session.limits.payload
        return ((at, min(at + step, length)) for at in range(0, length, step))

    async def _pieces(self, sends: Iterator[Callable[[], int]]) -> None:
        """Carry out the pieces of one request, a few in flight; stop at the first failure."""
        started: deque[asyncio.Future[Any]] = deque()
        try:
            for send in sends:
                if len(started) == _WINDOW:
                    await started.popleft()
                started.append(await self._start(send))
            while started:
                await started.popleft()
        finally:
            for future in started:  # after a failure: nobody waits for these any more
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen, so that asyncio does not report it as lost

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._slots.release()
            future = self._waiting.pop(event.cookie)
            if future.done():
                return  # cancelled: the late reply is dropped here
            if event.error is not None:
                future.set_exception(event.error)
            else:
                future.set_result(event.result)
        elif isinstance(event, Opened | Listed) and not self._greeted.done():
            self._greeted.set_result(event)

    def _on_end(self, reason: Callable[[], Error]) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(reason())
        for future in self._waiting.values():
            self._slots.release()  # whoever waits for a place shall learn that it is over
            if not future.done():
                future.set_exception(reason())
        self._waiting.clear()


def _tls_layer(
    where: Address | socket.socket, context: ssl.SSLContext | None, hostname: str | None
) -> TLSLayer | None:
    if context is None:
        return None
    from qmpblock.nbd.tls import TLSLayer

    if hostname is None and isinstance(where, TCPAddress):
        hostname = where.host
    return TLSLayer(context, hostname)
