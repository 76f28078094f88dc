"""An NBD server that says whatever a test tells it to, lies above all.

The bytes are built here from the numbers in the NBD specification, not with the codecs of
qmpblock.nbd.wire: a wrong number there must not be right here too.

Two halves: functions that make one message each, for tests of the pure protocol, and
`FakeServer`, which serves one connection over a socket pair by a script.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

MIB = 1 << 20
SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"
STYLES = (SIMPLE, STRUCTURED, EXTENDED)

ABORT, STARTTLS, GO, STRUCTURED_REPLY = 2, 5, 7, 8
LIST_CONTEXTS, SET_CONTEXTS, EXTENDED_HEADERS = 9, 10, 11
ACK, INFO, META_CONTEXT = 1, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_TLS_REQD = 0x80000001, 0x80000002, 0x80000005
ERR_UNKNOWN, ERR_SHUTDOWN = 0x80000006, 0x80000007

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
DONE = 1
# HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, DF, CACHE, FAST_ZERO; not READ_ONLY
ALL_FLAGS = 1 | 4 | 8 | 32 | 64 | 128 | 1024 | 2048
READ_ONLY = 2

# -- messages, in the order of a conversation


def greeting(flags: int = 3) -> bytes:
    return b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", flags)


def oldstyle_greeting(size: int = MIB) -> bytes:
    return b"NBDMAGIC" + struct.pack(">QQI124x", 0x00420281861253, size, 1)


def option_reply(option: int, kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    announced = len(data) if length is None else length
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, announced) + data


def export_info(size: int = MIB, flags: int = ALL_FLAGS) -> bytes:
    return option_reply(GO, INFO, struct.pack(">HQH", 0, size, flags))


def block_size_info(minimum: int = 1, preferred: int = 4096, maximum: int = 32 * MIB) -> bytes:
    return option_reply(GO, INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


def context_reply(number: int, name: str, option: int = SET_CONTEXTS) -> bytes:
    return option_reply(option, META_CONTEXT, struct.pack(">I", number) + name.encode())


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(
    style: str,
    cookie: int,
    kind: int,
    payload: bytes = b"",
    *,
    done: bool = False,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """Make one chunk; `offset` is the request's, which only extended headers repeat."""
    announced = len(payload) if length is None else length
    flags = DONE if done else 0
    if style == EXTENDED:
        head = struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, announced)
    else:
        head = struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, announced)
    return head + payload


def data_payload(offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset) + data


def hole_payload(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def error_payload(error: int, text: bytes = b"", offset: int | None = None) -> bytes:
    tail = b"" if offset is None else struct.pack(">Q", offset)
    return struct.pack(">IH", error, len(text)) + text + tail


def status_payload(style: str, context: int, extents: Sequence[tuple[int, int]]) -> bytes:
    if style == EXTENDED:
        head, form = struct.pack(">II", context, len(extents)), ">QQ"
    else:
        head, form = struct.pack(">I", context), ">II"
    return head + b"".join(struct.pack(form, *extent) for extent in extents)


@dataclass
class Settings:
    """What an honest handshake settles."""

    style: str = STRUCTURED
    size: int = MIB
    flags: int = ALL_FLAGS
    contexts: dict[int, str] = field(default_factory=dict)
    block_sizes: tuple[int, int, int] | None = None
    tls: bool = False


def answer_option(settings: Settings, option: int) -> bytes:
    """Make all replies of an honest server to one option."""
    style = settings.style
    if option == EXTENDED_HEADERS:
        return option_reply(option, ACK if style == EXTENDED else ERR_UNSUP)
    if option == STRUCTURED_REPLY:
        return option_reply(option, ERR_UNSUP if style == SIMPLE else ACK)
    if option in (SET_CONTEXTS, LIST_CONTEXTS):
        replies = (context_reply(i, name, option) for i, name in settings.contexts.items())
        return b"".join(replies) + option_reply(option, ACK)
    if option == GO:
        sizes = block_size_info(*settings.block_sizes) if settings.block_sizes else b""
        return export_info(settings.size, settings.flags) + sizes + option_reply(option, ACK)
    if option == STARTTLS:
        return option_reply(option, ACK if settings.tls else ERR_POLICY, b"")
    return option_reply(option, ACK if option == ABORT else ERR_UNSUP)


# -- a server


class Hangup(Exception):  # noqa: N818
    """The client's end of the stream came where the script wanted more."""


@dataclass(frozen=True)
class Request:
    """One request of the client."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


Script = Callable[["FakeServer"], Awaitable[None]]


class FakeServer:
    """Serves one connection by a script, and remembers what the client said.

    ::

        async with FakeServer(script) as server:
            client = await Client.connect(server.socket)

    :ivar socket: the client's end. `custody` keeps a duplicate of it open, as QEMU does.
    :ivar options: the options that came, in order.
    :ivar received: every byte that came.
    :ivar eof: whether the client's end of the stream was seen.
    """

    def __init__(
        self, script: Script, settings: Settings | None = None, *, custody: bool = False
    ) -> None:
        self.settings = settings or Settings()
        self.options: list[int] = []
        self.received = b""
        self.eof = False
        self._script = script
        self._seen = 0
        self.socket, self._own = socket.socketpair()
        self._own.setblocking(False)
        self._duplicate = self.socket.dup() if custody else None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.serve())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Give the script a moment to end by itself, then end it, and show its failure."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._task
        finally:
            self.close()

    def close(self) -> None:
        """Close both ends, and the duplicate."""
        self._own.close()
        self.socket.close()
        if self._duplicate is not None:
            self._duplicate.close()

    def saw_nothing(self) -> bool:
        """Whether neither a byte nor the end of the stream is waiting to be read."""
        try:
            self._own.recv(1)
        except BlockingIOError:
            return True
        return False

    async def serve(self) -> None:
        """Serve by the script, until it or the client ends."""
        with contextlib.suppress(Hangup, ConnectionError):
            await self._script(self)

    # -- bytes

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._own, data)

    async def receive(self, length: int) -> bytes:
        """Return exactly `length` bytes.

        :raise Hangup: the stream ended before.
        """
        while len(self.received) - self._seen < length:
            await self._more()
        self._seen += length
        return self.received[self._seen - length : self._seen]

    async def _more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self._own, 1 << 20)
        if not data:
            self.eof = True
            raise Hangup
        self.received += data

    def hang_up(self) -> None:
        """Close this end at once."""
        self._own.close()

    async def drain(self, seconds: float = 0.2) -> bytes:
        """Return what comes within `seconds` that was not asked for; note an end in `eof`."""
        with contextlib.suppress(TimeoutError, Hangup):
            async with asyncio.timeout(seconds):
                while True:
                    await self._more()
        rest = self.received[self._seen :]
        self._seen = len(self.received)
        return rest

    # -- honest steps, for scripts to begin with

    async def greet(self) -> None:
        await self.send(greeting())
        await self.receive(4)

    async def option(self) -> tuple[int, bytes]:
        magic, option, length = struct.unpack(">8sII", await self.receive(16))
        assert magic == b"IHAVEOPT", magic
        self.options.append(option)
        return option, await self.receive(length)

    async def handshake(self, until: int = GO) -> None:
        """Serve honestly up to and including the reply to the option `until`."""
        await self.greet()
        await self.haggle(until)

    async def haggle(self, until: int = GO) -> None:
        """Answer options honestly up to and including `until`."""
        option = None
        while option != until:
            option, _ = await self.option()
            await self.send(answer_option(self.settings, option))

    async def handshake_before(self, option: int) -> bytes:
        """Serve honestly until `option` is asked; return its data, unanswered."""
        await self.greet()
        while True:
            asked, data = await self.option()
            if asked == option:
                return data
            await self.send(answer_option(self.settings, asked))

    async def request(self) -> Request:
        """Return the next request."""
        if self.settings.style == EXTENDED:
            form, magic = struct.Struct(">IHHQQQ"), 0x21E41C71
        else:
            form, magic = struct.Struct(">IHHQQI"), 0x25609513
        found, flags, command, cookie, offset, length = form.unpack(await self.receive(form.size))
        assert found == magic, hex(found)
        payload = await self.receive(length) if command == WRITE else b""
        return Request(command, flags, cookie, offset, length, payload)

    def chunk(self, request: Request, kind: int, payload: bytes = b"", **more: object) -> bytes:
        """Make a chunk of the reply to `request`."""
        options = {"offset": request.offset, **more}
        return chunk(self.settings.style, request.cookie, kind, payload, **options)  # type: ignore[arg-type]

    def success(self, request: Request) -> bytes:
        """Make a reply without content."""
        if self.settings.style == EXTENDED:
            return self.chunk(request, NONE, done=True)
        return simple(request.cookie)
