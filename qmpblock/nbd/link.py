"""The asyncio end of one NBD connection: sockets, TLS and time, around the protocol.

Custody (K1). QEMU may hold a duplicate of our socket, and aborts if it sees the
stream end. Then only close(2) is allowed, which ends nothing while a duplicate is open. So:

- `abort()` is all that an impolite link ever does to its transport. asyncio's selector
  transports answer it with close(2); shutdown(2) is called only by `write_eof()`.
- no TLS close_notify and no TLS alert is sent;
- asyncio closes a transport that is garbage, or whose server went away, by close(2) too.

Progress, which the stall limit minds, is work done and not bytes seen: a server could hold us
with one byte a minute. In the handshake it is a step; later, a request that ended, or as many
bytes in either direction as a link of 1 KiB a second carries within the limit. How many bytes
may come for one request is bounded (`replies`), so no request lasts for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpblock.address import Address, UnixAddress
from qmpblock.errors import Error, NBDConnectError, StalledError, printable
from qmpblock.nbd.protocol import Event, Protocol, StartTLS, State
from qmpblock.nbd.wire import Bytes

if TYPE_CHECKING:
    from qmpblock.nbd.tls import TLSLayer

__all__ = ["Link", "connect"]

_HIGH_WATER = 1 << 20  # bytes waiting to leave from which on writers wait
_SLOWEST = 1024  # bytes a second; what is slower than that does not get anywhere
_JOIN = 64 << 10  # bytes; smaller pieces leave together, in one system call


class Link(asyncio.BufferedProtocol):
    """Carries bytes between a transport and a `Protocol`, and minds the stall limit.

    :param protocol: the NBD side.
    :param on_event: called with every event but StartTLS.
    :param on_end: called once, when the connection is dead, with a maker of the reason.
    :param tls: the layer to put in between when the server agrees, where TLS is wanted.
    :param polite: whether to end TLS and the stream in an orderly way.
    :param stall: seconds without progress, while something is awaited, that are too many.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        on_event: Callable[[Event], None],
        on_end: Callable[[Callable[[], Error]], None],
        tls: TLSLayer | None,
        polite: bool,
        stall: float,
    ) -> None:
        self._protocol = protocol
        self._on_event = on_event
        self._on_end = on_end
        self._tls_wanted = tls
        self._tls: TLSLayer | None = None
        self._polite = polite
        self._reason: Error | None = None
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._queue: list[Bytes] = []
        self._flushing = False
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._unsent = 0  # bytes, when last looked at
        self._counted = 0  # bytes received, when there last was progress
        self._worth = max(1, int(stall * _SLOWEST))  # bytes that are progress
        self._clock = _Clock(stall, self._stalled)

    # -- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; the server speaks first."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._clock.start()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._tls.get_buffer() if self._tls else self._protocol.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Pass received bytes on."""
        if self._ended:
            return
        before = self._protocol.state
        if self._tls is None:
            self._protocol.buffer_updated(nbytes)
        else:
            self._tls.buffer_updated(nbytes)
            self._decrypt()
        self._settle()
        if self._protocol.state is not before or (
            before is State.READY and self._protocol.received - self._counted >= self._worth
        ):
            self._progress()

    def eof_received(self) -> None:
        """Pass the end on; asyncio then closes the socket."""
        if self._tls is not None and not self._ended:
            self._tls.receive_eof()
            self._decrypt()
        self._protocol.receive_eof()
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the socket is closed."""
        self._protocol.receive_eof()
        self._lost.set()
        self._end()

    def pause_writing(self) -> None:
        """Hold writers back."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let writers go on."""
        self._writable.set()

    # -- called by the client

    async def drain(self) -> None:
        """Wait until there is room to send. Cancelling is harmless.

        :raise Error: the connection is dead.
        """
        await self._writable.wait()
        if self._ended:
            raise self.reason()

    def flush(self) -> None:
        """Send what the protocol has to say, and watch that an answer comes.

        Small requests wait for the end of this turn of the event loop, and leave together.
        """
        self._queue += self._protocol.data_to_send()
        if sum(map(len, self._queue)) >= _JOIN:
            self._send()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._send)
        if not self._ended:
            self._clock.start()

    def kill(self, reason: Error) -> None:
        """End the connection at once because of `reason`. Idempotent."""
        if self._reason is None:
            self._reason = reason
        self._end()

    async def close(self, patience: float) -> None:
        """End the connection; if polite, in an orderly way within `patience` seconds.

        Cancelled, it ends at once, and the socket is closed all the same. Idempotent.
        """
        try:
            if not self._ended:
                told = self._protocol.send_leave()
                self._send()
                if told:
                    await self._leave(patience)
        finally:
            self._end()
        await self._lost.wait()

    def reason(self) -> Error:
        """Make a new exception that says why the connection is dead."""
        own = self._reason
        if own is None:
            return self._protocol.dead()
        return type(own)(own.message, standing=own.standing, remedy=own.remedy)

    # -- the end

    async def _leave(self, patience: float) -> None:
        """Wait for the server to hang up, as it must after DISC."""
        if self._tls is not None:
            self._tls.close_notify()
            self._write(self._tls.data_to_send())
        # If it does not: it was told, and what it makes of that is its own affair.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._lost.wait()

    def _end(self) -> None:
        """Close the socket, and tell the client once. No byte is added to what leaves."""
        if self._ended:
            return
        self._ended = True
        self._clock.close()
        self._writable.set()
        if self._transport is not None:
            if self._polite and self._protocol.state is not State.READY:
                self._transport.close()  # an ABORT or a TLS alert, a few bytes, still leaves
            else:
                self._transport.abort()
        self._on_end(self.reason)

    def _settle(self) -> None:
        """Send what is due, tell what happened, and end what is dead."""
        events = self._protocol.events_received()
        if events:
            self._progress()
        for event in events:
            if isinstance(event, StartTLS):
                self._send()
                self._tls = self._tls_wanted
                self._shake_hands()
            else:
                self._on_event(event)
        self._send()
        if self._protocol.failure is not None or self._reason is not None:
            self._end()
        elif not self._waiting:
            self._clock.stop()

    def _progress(self) -> None:
        self._counted = self._protocol.received
        self._clock.moved()

    def _stalled(self) -> bool:
        """Decide, the stall limit being over, whether nothing got done; then end."""
        unsent = self._transport.get_write_buffer_size() if self._transport else 0
        before, self._unsent = self._unsent, unsent
        if before - unsent >= min(self._worth, before) > 0:
            return False  # the server still takes what we send
        if self._protocol.state is State.READY:
            words, standing = (
                f"with {self._protocol.in_flight} requests in flight",
                "whether it carried those out is unknown; the connection is closed",
            )
        else:
            words, standing = f"while we awaited {self._protocol.state.value}", None
        limit = f"{self._clock.limit:g} seconds"
        self.kill(
            StalledError(f"the NBD server did nothing for {limit} {words}", standing=standing)
        )
        return True

    @property
    def _waiting(self) -> bool:
        return self._protocol.state is not State.READY or self._protocol.in_flight > 0

    # -- sending

    def _send(self) -> None:
        self._flushing = False
        if self._ended:
            return
        queue, self._queue = self._queue + self._protocol.data_to_send(), []
        small: list[Bytes] = []
        for data in queue:
            if len(data) < _JOIN:
                small.append(data)
                continue
            self._encrypt(b"".join(small))
            self._encrypt(data)
            small.clear()
        self._encrypt(b"".join(small))

    def _encrypt(self, data: Bytes) -> None:
        if self._tls is not None and len(data):
            self._tls.write(data)
            data = self._tls.data_to_send()
        self._write(data)

    def _write(self, data: Bytes) -> None:
        if len(data) and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
            self._unsent = self._transport.get_write_buffer_size()

    # -- TLS

    def _shake_hands(self) -> None:
        assert self._tls is not None
        try:
            done = self._tls.shake_hands()
        except Error as error:
            self._reason = error
            if not self._polite:
                return  # the alert that is ready to leave would end the session
            done = False
        self._write(self._tls.data_to_send())
        if done:
            self._protocol.tls_started()

    def _decrypt(self) -> None:
        assert self._tls is not None
        if not self._tls.established:
            self._shake_hands()
        try:
            while self._tls.established and self._reason is None:
                length = self._tls.read_into(self._protocol.get_buffer())
                if not length:
                    break
                self._protocol.buffer_updated(length)
        except EOFError:
            self._protocol.receive_eof()
        except Error as error:
            self._reason = error


class _Clock:
    """Calls `expired` when it ran for `limit` seconds and nothing moved.

    `expired` returns False if something did move after all.
    """

    def __init__(self, limit: float, expired: Callable[[], bool]) -> None:
        self.limit = limit
        self._expired = expired
        self._loop = asyncio.get_running_loop()
        self._running = False
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to count, unless that goes on already."""
        if not self._running:
            self._running = True
            self.moved()
        if self._timer is None:
            self._timer = self._loop.call_later(self.limit, self._look)

    def moved(self) -> None:
        """Count from now."""
        self._last = self._loop.time()

    def stop(self) -> None:
        """Count no more. The timer is left: it is cheaper to let it find nothing."""
        self._running = False

    def close(self) -> None:
        """Count never again. The timer must go: it would hold all of a dead connection."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._running:
            return
        left = self._last + self.limit - self._loop.time()
        if left <= 0:
            if self._expired():
                return
            self.moved()
            left = self.limit
        self._timer = self._loop.call_later(left, self._look)


async def connect(
    where: Address | socket.socket, make_link: Callable[[], Link], stall: float
) -> Link:
    """Connect a new link. A socket given is ours from now on, and closed on any failure.

    :raise NBDConnectError: nothing answers there.
    :raise StalledError: nothing happened for `stall` seconds.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(stall):
            if isinstance(where, socket.socket):
                _, link = await loop.create_connection(make_link, sock=where)
            elif isinstance(where, UnixAddress):
                _, link = await loop.create_unix_connection(make_link, where.path)
            else:
                _, link = await loop.create_connection(make_link, where.host, where.port)
    except BaseException as error:
        if isinstance(where, socket.socket):
            where.close()
        if isinstance(error, TimeoutError):
            raise StalledError(f"no connection to {where} within {stall:g} seconds") from error
        if isinstance(error, OSError):
            raise NBDConnectError(
                f"cannot connect to the NBD server at {printable(where)}: {printable(error)}",
                remedy="check the address, and that the server runs and may be reached",
            ) from error
        raise
    return link
