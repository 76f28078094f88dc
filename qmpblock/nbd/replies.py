"""What may come back for one request, checked chunk by chunk before it is believed.

A reply to a read of [0, 12), its chunks in any order and between those of other replies::

    offset        0       4       8      12
    DATA @4+4             |#######|              inside the request, no overlap: kept
    HOLE @8+4                     |.......|      likewise
    DATA @6+2                 |###|              overlap:   the connection is dead
    DATA @10+4                       |#######|   outside:   the connection is dead
    NONE, DONE                                   [0, 4) was never sent: dead as well

A block status reply to [0, 12), one chunk for each context and each ending where it likes::

    context 1     |##|....|#######|----- - -     the last extent may reach past the end: cut
    context 2     |...|                          may be short: ask again from there
                  |##||...|#######|...|          an extent that begins past the end: dead

An error chunk fails the request, whatever else was or will be sent, but not the connection.
Sources: NBD doc/proto.md, "Structured reply types", "NBD_CMD_READ", "NBD_CMD_BLOCK_STATUS".
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpblock.errors import NBDProtocolError, NBDRequestError
from qmpblock.nbd import wire
from qmpblock.nbd.wire import ChunkType, Command, CommandFlag, HeaderStyle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qmpblock.nbd.session import Session

__all__ = ["PlainReply", "ReadReply", "Reply", "Result", "StatusReply"]

Result = None | memoryview | Mapping[str, "NDArray[np.uint64]"]

SPARE_CHUNKS = 1024  # of one reply, beyond what a server at its least efficient needs
ZEROS = bytes(64 << 10)


class Reply:
    """The reply to one request, while it arrives.

    :param cookie: of the request.
    :param offset: of the request, in bytes.
    :param length: of the request, in bytes.
    :ivar error: the first error that the server reported, or None.
    """

    content: frozenset[int] = frozenset()  # chunk types legal here besides NONE and errors
    simple_success = True  # a simple reply may say that it succeeded

    def __init__(
        self, command: Command, flags: CommandFlag, cookie: int, offset: int, length: int
    ) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.error: NBDRequestError | None = None
        self.begun = False  # a chunk has come: a simple reply is no longer possible
        self._chunks_left = SPARE_CHUNKS

    def __str__(self) -> str:
        if self.command is Command.FLUSH:
            return "FLUSH"
        return f"{self.command.name} {self.offset}+{self.length}"

    def violation(self, words: str) -> NBDProtocolError:
        """Make the error for a reply that the protocol forbids."""
        return NBDProtocolError(
            f"the server broke the NBD protocol in its reply to {self}: {words}"
        )

    def admit(self, chunk: wire.Chunk) -> None:
        """Check the head of a chunk, before any of its payload is stored.

        :raise NBDProtocolError: this chunk may not come here, or not in this length.
        """
        self.begun = True
        self._chunks_left -= 1
        if self._chunks_left < 0:
            raise self.violation("it does not end")
        if chunk.offset not in (None, self.offset):
            raise self.violation(f"it is labelled with the offset {chunk.offset}")
        if chunk.type == ChunkType.NONE:
            if chunk.length or not chunk.flags & wire.CHUNK_DONE:
                raise self.violation("an empty chunk has a payload, or is not the last")
        elif chunk.type & wire.ERROR_BIT:
            if not wire.ERROR_SIZE <= chunk.length <= wire.MAX_ERROR_CHUNK:
                raise self.violation(f"an error chunk announces {chunk.length} bytes")
        elif chunk.type in self.content:
            self.admit_content(chunk)
        else:
            raise self.violation(f"a chunk of type {chunk.type:#x} does not belong there")

    def admit_content(self, chunk: wire.Chunk) -> None:
        """Check the head of a chunk whose type is in `content`."""

    def fail(self, error: int, text: str = "", offset: int | None = None) -> None:
        """Note that the request failed; the first error is the one that is told.

        :raise NBDProtocolError: the error's offset lies outside the request.
        """
        if offset is not None and self.command is not Command.FLUSH:
            if not self.offset <= offset < self.offset + self.length:
                raise self.violation(f"it reports an error at {offset}, outside the request")
            text = f"{text or 'no words'} (at offset {offset})"
        if self.error is None:
            self.error = NBDRequestError(str(self), error, text)

    @abstractmethod
    def finish(self) -> Result:
        """Return the result, the last chunk having come and no error with it.

        :raise NBDProtocolError: something is missing.
        """


class PlainReply(Reply):
    """Success or an error, and nothing else: all commands but READ and BLOCK_STATUS."""

    def finish(self) -> None:
        """Return nothing: it succeeded."""


class ReadReply(Reply):
    """Data and holes, landing in `into`, which is as long as the request."""

    content = frozenset({ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE})
    simple_success = False

    def __init__(self, flags: CommandFlag, cookie: int, offset: int, into: memoryview) -> None:
        super().__init__(Command.READ, flags, cookie, offset, len(into))
        self.into = into
        # Servers should cut at multiples of 512 ("SHOULD use chunks with lengths and offsets
        # as an integer multiple of 512 bytes"); one that sends single bytes is an attack.
        self._chunks_left = SPARE_CHUNKS + self.length // 512
        self._contents = 0
        self._starts: list[int] = []  # what has come: disjoint, sorted, neighbours merged
        self._ends: list[int] = []

    def admit_content(self, chunk: wire.Chunk) -> None:
        """Bound a content chunk by the request."""
        if chunk.type == ChunkType.OFFSET_HOLE:
            if chunk.length != wire.HOLE_SIZE:
                raise self.violation(f"a hole chunk announces {chunk.length} bytes, not 12")
        elif not wire.DATA_OFFSET_SIZE < chunk.length <= wire.DATA_OFFSET_SIZE + self.length:
            raise self.violation(f"a data chunk announces {chunk.length} bytes")
        self._contents += 1
        if self._contents > 1 and self.flags & CommandFlag.DF:
            raise self.violation("it is fragmented, in spite of the DF flag")

    def place(self, offset: int, length: int) -> memoryview:
        """Return where content of `length` bytes for `offset` of the export goes.

        :raise NBDProtocolError: it is empty, outside the request, or came before.
        """
        start, end = offset - self.offset, offset - self.offset + length
        if length < 1 or start < 0 or end > self.length:
            raise self.violation(f"it sends {offset}+{length}")
        self._cover(start, end)
        return self.into[start:end]

    def hole(self, offset: int, length: int) -> None:
        """Note that `length` bytes at `offset` of the export read as zeros."""
        where = self.place(offset, length)
        for at in range(0, length, len(ZEROS)):
            piece = where[at : at + len(ZEROS)]
            piece[:] = ZEROS[: len(piece)]

    def finish(self) -> memoryview:
        """Return the bytes, every one of which has come."""
        if self._starts != [0] or self._ends != [self.length]:
            raise self.violation("it ends without an error and without all of the data")
        return self.into

    def _cover(self, start: int, end: int) -> None:
        at = bisect_right(self._starts, start)
        before = at > 0 and self._ends[at - 1] > start
        after = at < len(self._starts) and self._starts[at] < end
        if before or after:
            raise self.violation(f"it sends {self.offset + start}+{end - start} twice")
        joins_before = at > 0 and self._ends[at - 1] == start
        joins_after = at < len(self._starts) and self._starts[at] == end
        if joins_before and joins_after:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_before:
            self._ends[at - 1] = end
        elif joins_after:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)


class StatusReply(Reply):
    """Extents of each metadata context, exactly one chunk a context."""

    simple_success = False

    def __init__(
        self, flags: CommandFlag, cookie: int, offset: int, length: int, session: Session
    ) -> None:
        super().__init__(Command.BLOCK_STATUS, flags, cookie, offset, length)
        self._session = session
        self._extents: dict[str, NDArray[np.uint64]] = {}
        extended = session.style is HeaderStyle.EXTENDED
        self.content = frozenset(
            {ChunkType.BLOCK_STATUS_EXT if extended else ChunkType.BLOCK_STATUS}
        )

    def admit_content(self, chunk: wire.Chunk) -> None:
        """Bound a block status chunk: whole extents, at most 2^20."""
        if not wire.status_length_legal(self._session.style, chunk.length):
            raise self.violation(f"a block status chunk announces {chunk.length} bytes")

    def take(self, payload: wire.Bytes) -> None:
        """Take the payload of a block status chunk.

        :raise NBDProtocolError: the context was not negotiated or came before, or an extent
            is empty, begins past the end of the request, or is one too many for REQ_ONE.
        """
        number, extents = wire.decode_block_status(self._session.style, payload)
        name = self._session.contexts.get(number)
        if name is None:
            raise self.violation(f"the context id {number} was never negotiated")
        if name in self._extents:
            raise self.violation(f"the context {name} comes twice")
        self._extents[name] = self._cut(extents)

    def finish(self) -> Mapping[str, NDArray[np.uint64]]:
        """Return the extents, those of every context having come."""
        missing = set(self._session.contexts.values()) - set(self._extents)
        if missing:
            raise self.violation(f"it says nothing of the context {min(missing)}")
        return self._extents

    def _cut(self, extents: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Check the extents' lengths, and cut the last to the end of the request."""
        import numpy as np

        lengths = extents[:, 0]
        if not lengths.all():
            raise self.violation("an extent has the length 0")
        one = bool(self.flags & CommandFlag.REQ_ONE)
        if one and (len(extents) > 1 or int(lengths[0]) > self.length):
            raise self.violation("more than the one extent that was asked for")
        ends = np.cumsum(lengths[:-1])
        # A sum beyond 2^64 wraps; as no length is 0, it shows as an end that does not grow.
        if len(ends) and (int(ends[-1]) >= self.length or bool((ends[1:] <= ends[:-1]).any())):
            raise self.violation("an extent begins past the end of the request")
        begins = int(ends[-1]) if len(ends) else 0
        extents[-1, 0] = min(int(lengths[-1]), self.length - begins)
        return self._align(extents, begins)

    def _align(self, extents: NDArray[np.uint64], begins: int) -> NDArray[np.uint64]:
        """Drop what follows the last boundary of a minimum block, but at the request's end.

        A server should not stop between (qemu-nbd 3.1 does, at the end of a file), and the
        next request could not begin there.
        """
        import numpy as np

        covered = begins + int(extents[-1, 0])
        block = self._session.block_sizes.minimum
        aligned = covered // block * block
        if aligned == covered or covered == self.length:
            return extents
        if aligned == 0:
            raise self.violation(f"its extents end within the first block of {block} bytes")
        ends = np.cumsum(extents[:, 0])
        keep = int(np.searchsorted(ends, aligned)) + 1
        extents = extents[:keep]
        extents[-1, 0] -= np.uint64(int(ends[keep - 1]) - aligned)
        return extents
