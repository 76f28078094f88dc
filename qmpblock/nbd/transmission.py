"""Requests and their replies over an open export, without I/O.

Many requests are in flight; their replies come in any order and the chunks of several
interleaved. A reply is known by its cookie, a number of ours that never comes twice.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from qmpblock.errors import NBDProtocolError, NBDRequestError
from qmpblock.nbd import wire
from qmpblock.nbd.replies import PlainReply, ReadReply, Reply, Result, StatusReply
from qmpblock.nbd.session import Session
from qmpblock.nbd.wire import ChunkType, Command, CommandFlag, HeaderStyle

__all__ = ["Finished", "Transmission"]


@dataclass(frozen=True)
class Finished:
    """A request has ended: with its result, or with the server's error.

    :param result: of a read its buffer, of a block status the extents of each context.
    """

    cookie: int
    result: Result
    error: NBDRequestError | None


class Transmission:
    """The requests in flight on one session.

    `parse` reads replies for ever, `out` collects what to send, `finished` what has ended.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.out: list[wire.Bytes] = []
        self.finished: list[Finished] = []
        self._in_flight: dict[int, Reply] = {}
        self._cookie = 0

    @property
    def in_flight(self) -> int:
        """How many requests have no complete reply yet."""
        return len(self._in_flight)

    # -- requests

    def read(self, offset: int, into: memoryview, flags: CommandFlag) -> int:
        """Send READ for `len(into)` bytes, to land in `into`; return the cookie."""
        self.session.check(Command.READ, offset, len(into), flags)
        return self._send(ReadReply(flags, self._next(), offset, into))

    def write(self, offset: int, data: wire.Bytes, flags: CommandFlag) -> int:
        """Send WRITE; `data` must not change before it has left; return the cookie."""
        self.session.check(Command.WRITE, offset, len(data), flags)
        cookie = self._send(PlainReply(Command.WRITE, flags, self._next(), offset, len(data)))
        self.out.append(data)
        return cookie

    def block_status(self, offset: int, length: int, flags: CommandFlag) -> int:
        """Send BLOCK_STATUS; return the cookie."""
        self.session.check(Command.BLOCK_STATUS, offset, length, flags)
        return self._send(StatusReply(flags, self._next(), offset, length, self.session))

    def plain(self, command: Command, offset: int, length: int, flags: CommandFlag) -> int:
        """Send a command that has neither payload nor result; return the cookie."""
        self.session.check(command, offset, length, flags)
        return self._send(PlainReply(command, flags, self._next(), offset, length))

    def disconnect(self) -> None:
        """Send DISC, to which no reply comes; nothing may be sent after it."""
        self.out.append(
            wire.encode_request(self.session.style, CommandFlag.NONE, Command.DISC, 0, 0, 0)
        )

    def _next(self) -> int:
        self._cookie += 1
        return self._cookie

    def _send(self, reply: Reply) -> int:
        flags = reply.flags
        if reply.command is Command.WRITE and self.session.style is HeaderStyle.EXTENDED:
            flags |= CommandFlag.PAYLOAD_LEN
        self.out.append(
            wire.encode_request(
                self.session.style, flags, reply.command, reply.cookie, reply.offset, reply.length
            )
        )
        self._in_flight[reply.cookie] = reply
        return reply.cookie

    # -- replies

    def parse(self) -> Generator[int | memoryview, memoryview, None]:
        """Read replies; yield how many bytes are needed, or a buffer to be filled.

        :raise NBDProtocolError: the server broke the protocol; no byte after that counts.
        """
        while True:
            if self.session.style is HeaderStyle.EXTENDED:
                header = yield wire.EXTENDED_REPLY_SIZE
                self._expect(wire.decode_magic(header), wire.EXTENDED_REPLY_MAGIC)
                yield from self._chunk(wire.decode_extended_reply(header))
                continue
            header = yield wire.SIMPLE_REPLY_SIZE
            magic = wire.decode_magic(header)
            if magic == wire.SIMPLE_REPLY_MAGIC:
                yield from self._simple(wire.decode_simple_reply(header))
            elif self.session.style is HeaderStyle.STRUCTURED:
                self._expect(magic, wire.STRUCTURED_REPLY_MAGIC)
                head = bytes(header)
                tail = yield wire.STRUCTURED_REPLY_SIZE - wire.SIMPLE_REPLY_SIZE
                yield from self._chunk(wire.decode_structured_reply(head + tail))
            else:
                self._expect(magic, wire.SIMPLE_REPLY_MAGIC)

    def _expect(self, magic: int, expected: int) -> None:
        if magic != expected:
            raise NBDProtocolError(
                f"the server broke the NBD protocol: a reply begins with {magic:#010x}, "
                f"not with {expected:#010x}"
            )

    def _reply(self, cookie: int) -> Reply:
        reply = self._in_flight.get(cookie)
        if reply is None:
            raise NBDProtocolError(
                f"the server broke the NBD protocol: it replies to a request {cookie:#x} "
                "that is not in flight"
            )
        return reply

    def _simple(self, header: wire.SimpleReply) -> Generator[int | memoryview, memoryview, None]:
        reply = self._reply(header.cookie)
        structured = self.session.style is not HeaderStyle.SIMPLE
        if reply.begun:
            raise reply.violation("a simple reply follows its chunks")
        if structured and isinstance(reply, ReadReply):
            raise reply.violation("it is a simple reply, though structured ones were agreed on")
        if header.error:
            reply.fail(header.error)
        elif isinstance(reply, ReadReply):
            yield reply.place(reply.offset, reply.length)
        elif not reply.simple_success:
            raise reply.violation("it says nothing")
        self._end(reply)

    def _chunk(self, chunk: wire.Chunk) -> Generator[int | memoryview, memoryview, None]:
        reply = self._reply(chunk.cookie)
        reply.admit(chunk)
        if chunk.type & wire.ERROR_BIT:
            told = wire.decode_error(chunk.type, (yield chunk.length))
            reply.fail(told.error, told.text, told.offset)
        elif chunk.type == ChunkType.OFFSET_DATA:
            assert isinstance(reply, ReadReply)
            offset = wire.decode_data_offset((yield wire.DATA_OFFSET_SIZE))
            yield reply.place(offset, chunk.length - wire.DATA_OFFSET_SIZE)
        elif chunk.type == ChunkType.OFFSET_HOLE:
            assert isinstance(reply, ReadReply)
            reply.hole(*wire.decode_hole((yield wire.HOLE_SIZE)))
        elif chunk.type != ChunkType.NONE:
            assert isinstance(reply, StatusReply)
            reply.take((yield memoryview(bytearray(chunk.length))))
        if chunk.flags & wire.CHUNK_DONE:
            self._end(reply)

    def _end(self, reply: Reply) -> None:
        result = None if reply.error else reply.finish()
        del self._in_flight[reply.cookie]
        self.finished.append(Finished(reply.cookie, result, reply.error))
