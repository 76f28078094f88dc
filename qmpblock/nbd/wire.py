"""NBD on the wire: the numbers, and a codec for every message we send or receive.

Each docstring is the layout, `S:` from the server, `C:` from the client; every integer is
big-endian. Decoders check what the bytes alone can tell (magic, lengths, ranges) and raise
NBDProtocolError; what only the conversation can tell is checked where the state is kept.

Source: the NBD project's doc/proto.md, and its branch `extension-ext-header` for extended
headers, which QEMU speaks since 8.2.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple

from qmpblock.errors import NBDProtocolError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Bytes = bytes | bytearray | memoryview

# Handshake
NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
OLDSTYLE_MAGIC = bytes.fromhex("0000420281861253")
OPTION_REPLY_MAGIC = 0x3E889045565A9
# Transmission
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096  # bytes; no string of the protocol is longer ("Conventions")
MAX_OPTION_REPLY = 2 * MAX_STRING  # bytes; the largest reply we know is 4 + MAX_STRING
MAX_PAYLOAD = 32 << 20  # bytes of a read or write that every server takes ("Size constraints")
MAX_MINIMUM_BLOCK = 64 << 10
MAX_EXTENTS = 1 << 20  # of one chunk (NBD_REPLY_TYPE_BLOCK_STATUS)
MAX_SIZE = (1 << 63) - 1  # of an export: what an off_t holds
MAX_ERROR_CHUNK = 6 + MAX_STRING + 64  # 64: fields that a future error type may add at its end

ERROR_BIT = 1 << 15  # of a chunk type
REPLY_ERROR_BIT = 1 << 31  # of an option reply type
ESHUTDOWN = 108


class HandshakeFlag(IntFlag):
    """Flags of the greeting, and (same bits) of the client's answer."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """NBD_OPT_*."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """NBD_REP_*."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR_BIT + 1
    ERR_POLICY = REPLY_ERROR_BIT + 2
    ERR_INVALID = REPLY_ERROR_BIT + 3
    ERR_PLATFORM = REPLY_ERROR_BIT + 4
    ERR_TLS_REQD = REPLY_ERROR_BIT + 5
    ERR_UNKNOWN = REPLY_ERROR_BIT + 6
    ERR_SHUTDOWN = REPLY_ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR_BIT + 8
    ERR_TOO_BIG = REPLY_ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = REPLY_ERROR_BIT + 10


class Info(IntEnum):
    """NBD_INFO_*."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """NBD_FLAG_*: what the export can do. Unknown bits are kept and ignored."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """NBD_CMD_*."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """NBD_CMD_FLAG_*."""

    NONE = 0
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    """NBD_REPLY_TYPE_*."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = ERROR_BIT + 1
    ERROR_OFFSET = ERROR_BIT + 2


CHUNK_DONE = 1 << 0  # NBD_REPLY_FLAG_DONE; unknown flags are ignored, as the protocol says


class HeaderStyle(IntEnum):
    """How requests and replies are framed, as the handshake settled it."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


# -- handshake ---------------------------------------------------------------------------

_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")

GREETING_FLAGS_SIZE = 2
OPTION_REPLY_SIZE = _OPTION_REPLY.size


class OptionReplyHeader(NamedTuple):
    """The head of one option reply; `length` bytes of data follow."""

    option: int
    type: int
    length: int


class BlockSizes(NamedTuple):
    """Bytes: alignment of every request, efficient size, most that one read or write carries."""

    minimum: int
    preferred: int
    maximum: int


DEFAULT_BLOCK_SIZES = BlockSizes(1, 4096, MAX_PAYLOAD)  # "Size constraints": not advertised


def encode_client_flags(flags: int) -> bytes:
    """C: 32 bits, client flags."""
    return _CLIENT_FLAGS.pack(flags)


def encode_option(option: Option, data: bytes = b"") -> bytes:
    """Encode one option.

    | C: 64 bits, `IHAVEOPT`
    | C: 32 bits, option
    | C: 32 bits, length of the data
    | C: data
    """
    return _OPTION.pack(IHAVEOPT, option, len(data)) + data


def encode_go(export: bytes, infos: Sequence[Info]) -> bytes:
    """Encode the data of NBD_OPT_GO.

    | C: 32 bits, length of the export name
    | C: export name
    | C: 16 bits, number of information requests
    | C: 16 bits each, information request
    """
    return b"".join(
        [_U32.pack(len(export)), export, _U16.pack(len(infos)), *(_U16.pack(i) for i in infos)]
    )


def encode_contexts(export: bytes, queries: Sequence[bytes]) -> bytes:
    """Encode the data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT.

    | C: 32 bits, length of the export name
    | C: export name
    | C: 32 bits, number of queries
    | C: 32 bits, length of the query; query; as many times
    """
    parts = [_U32.pack(len(export)), export, _U32.pack(len(queries))]
    for query in queries:
        parts += [_U32.pack(len(query)), query]
    return b"".join(parts)


def decode_option_reply(header: Bytes) -> OptionReplyHeader:
    """Decode the 20 bytes that head each option reply.

    | S: 64 bits, 0x3e889045565a9
    | S: 32 bits, the option this answers
    | S: 32 bits, reply type; bit 31 set: an error, the data are its text
    | S: 32 bits, length of the data, at most 8192 here
    | S: data
    """
    magic, option, kind, length = _OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC:
        raise NBDProtocolError(f"an option reply begins with {magic:#x}, not the reply magic")
    if length > MAX_OPTION_REPLY:
        raise NBDProtocolError(f"an option reply announces {length} bytes")
    return OptionReplyHeader(option, kind, length)


def decode_info_type(data: Bytes) -> int:
    """S: 16 bits, information type; then what the type says."""
    if len(data) < _U16.size:
        raise NBDProtocolError(f"an information reply of {len(data)} bytes has no type")
    kind: int = _U16.unpack_from(data)[0]
    return kind


def decode_info_export(data: Bytes) -> tuple[int, TransmissionFlag]:
    """Decode NBD_INFO_EXPORT: size in bytes, flags.

    | S: 16 bits, 0
    | S: 64 bits, size of the export, at most 2^63 - 1 here
    | S: 16 bits, transmission flags, bit 0 set
    """
    if len(data) != _INFO_EXPORT.size:
        raise NBDProtocolError(f"the export information is {len(data)} bytes long, not 12")
    _, size, flags = _INFO_EXPORT.unpack(data)
    if size > MAX_SIZE:
        raise NBDProtocolError(f"the export claims a size of {size} bytes, beyond 2^63 - 1")
    if not flags & TransmissionFlag.HAS_FLAGS:
        raise NBDProtocolError(f"the transmission flags {flags:#06x} lack NBD_FLAG_HAS_FLAGS")
    return size, TransmissionFlag(flags)


def decode_info_block_size(data: Bytes) -> BlockSizes:
    """Decode NBD_INFO_BLOCK_SIZE.

    | S: 16 bits, 3
    | S: 32 bits, minimum: a power of 2, at most 65536
    | S: 32 bits, preferred: a power of 2, at least the minimum and 512
    | S: 32 bits, maximum payload, at least the preferred size
    """
    if len(data) != _INFO_BLOCK_SIZE.size:
        raise NBDProtocolError(f"the block size information is {len(data)} bytes long, not 14")
    _, minimum, preferred, maximum = _INFO_BLOCK_SIZE.unpack(data)
    if not _power_of_two(minimum) or minimum > MAX_MINIMUM_BLOCK:
        raise NBDProtocolError(f"the minimum block size {minimum} is no power of 2 up to 65536")
    if not _power_of_two(preferred) or preferred < max(minimum, 512):
        raise NBDProtocolError(
            f"the preferred block size {preferred} is no power of 2 from "
            f"{max(minimum, 512)} (minimum {minimum})"
        )
    if maximum < preferred:
        raise NBDProtocolError(f"the maximum payload {maximum} is below the block size {preferred}")
    return BlockSizes(minimum, preferred, maximum)


def decode_meta_context(data: Bytes) -> tuple[int, str]:
    """Decode NBD_REP_META_CONTEXT: id, name.

    | S: 32 bits, metadata context id
    | S: name, UTF-8, at most 4096 bytes
    """
    if len(data) <= _U32.size:
        raise NBDProtocolError(f"a metadata context reply of {len(data)} bytes has no name")
    name = bytes(data[_U32.size :])
    if len(name) > MAX_STRING:
        raise NBDProtocolError(f"a metadata context name is {len(name)} bytes long")
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise NBDProtocolError(f"the context name {printable(name)} is not UTF-8") from None
    return _U32.unpack_from(data)[0], text


# -- transmission ------------------------------------------------------------------------

_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_SIMPLE_REPLY = struct.Struct(">IIQ")
_STRUCTURED_REPLY = struct.Struct(">IHHQI")
_EXTENDED_REPLY = struct.Struct(">IHHQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_STATUS_EXT = struct.Struct(">II")

SIMPLE_REPLY_SIZE = _SIMPLE_REPLY.size
STRUCTURED_REPLY_SIZE = _STRUCTURED_REPLY.size
EXTENDED_REPLY_SIZE = _EXTENDED_REPLY.size
DATA_OFFSET_SIZE = _U64.size
HOLE_SIZE = _HOLE.size
ERROR_SIZE = _ERROR.size


class SimpleReply(NamedTuple):
    """A reply without payload, or with exactly the bytes of an old-style read."""

    error: int
    cookie: int


class Chunk(NamedTuple):
    """The head of one chunk of a structured or extended reply; `length` bytes follow."""

    flags: int
    type: int
    cookie: int
    offset: int | None  # of the request, repeated; extended headers only
    length: int


def encode_request(
    style: HeaderStyle, flags: int, command: int, cookie: int, offset: int, length: int
) -> bytes:
    """Encode a request; a write's data follow it.

    | C: 32 bits, 0x25609513; with extended headers 0x21e41c71
    | C: 16 bits, command flags
    | C: 16 bits, command
    | C: 64 bits, cookie
    | C: 64 bits, offset
    | C: 32 bits, length; with extended headers 64 bits
    """
    if style is HeaderStyle.EXTENDED:
        return _EXTENDED_REQUEST.pack(
            EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length
        )
    return _REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def decode_simple_reply(header: Bytes) -> SimpleReply:
    """Decode a simple reply, its magic already seen.

    | S: 32 bits, 0x67446698
    | S: 32 bits, error, 0 for success
    | S: 64 bits, cookie
    """
    _, error, cookie = _SIMPLE_REPLY.unpack(header)
    return SimpleReply(error, cookie)


def decode_structured_reply(header: Bytes) -> Chunk:
    """Decode the head of a structured reply chunk, its magic already seen.

    | S: 32 bits, 0x668e33ef
    | S: 16 bits, flags; bit 0: the last chunk of this reply
    | S: 16 bits, chunk type
    | S: 64 bits, cookie
    | S: 32 bits, length of the payload
    """
    _, flags, kind, cookie, length = _STRUCTURED_REPLY.unpack(header)
    return Chunk(flags, kind, cookie, None, length)


def decode_extended_reply(header: Bytes) -> Chunk:
    """Decode the head of an extended reply chunk, its magic already seen.

    | S: 32 bits, 0x6e8a278c
    | S: 16 bits, flags; bit 0: the last chunk of this reply
    | S: 16 bits, chunk type
    | S: 64 bits, cookie
    | S: 64 bits, offset of the request
    | S: 64 bits, length of the payload
    """
    _, flags, kind, cookie, offset, length = _EXTENDED_REPLY.unpack(header)
    return Chunk(flags, kind, cookie, offset, length)


def decode_magic(header: Bytes) -> int:
    """S: 32 bits, which kind of reply this is."""
    magic: int = _U32.unpack_from(header)[0]
    return magic


def decode_data_offset(payload: Bytes) -> int:
    """S: 64 bits, offset of the data that follow (NBD_REPLY_TYPE_OFFSET_DATA)."""
    offset: int = _U64.unpack(payload)[0]
    return offset


def decode_hole(payload: Bytes) -> tuple[int, int]:
    """Decode NBD_REPLY_TYPE_OFFSET_HOLE: offset, length.

    | S: 64 bits, offset
    | S: 32 bits, length, not 0
    """
    offset, length = _HOLE.unpack(payload)
    return offset, length


class ErrorPayload(NamedTuple):
    """What an error chunk says; `offset` only in NBD_REPLY_TYPE_ERROR_OFFSET."""

    error: int
    text: str
    offset: int | None


def decode_error(kind: int, payload: Bytes) -> ErrorPayload:
    """Decode the payload of an error chunk of any type.

    | S: 32 bits, error, not 0
    | S: 16 bits, length of the message, at most 4096
    | S: message
    | S: 64 bits, offset (NBD_REPLY_TYPE_ERROR_OFFSET); else whatever a later type adds
    """
    if len(payload) < ERROR_SIZE:
        raise NBDProtocolError(f"an error chunk has {len(payload)} bytes, not even 6")
    error, length = _ERROR.unpack_from(payload)
    end = ERROR_SIZE + length
    tail = _U64.size if kind == ChunkType.ERROR_OFFSET else 0
    if length > MAX_STRING or end + tail > len(payload):
        raise NBDProtocolError(
            f"an error chunk of {len(payload)} bytes claims a message of {length}"
        )
    if error == 0:
        raise NBDProtocolError("an error chunk carries the error number 0")
    # For people only: what is not UTF-8 is shown escaped rather than refused.
    text = bytes(payload[ERROR_SIZE:end]).decode(errors="backslashreplace")
    offset = _U64.unpack_from(payload, end)[0] if tail else None
    return ErrorPayload(error, text, offset)


def status_length_legal(style: HeaderStyle, length: int) -> bool:
    """Whether a block status payload of `length` bytes holds whole extents, 1 to 2^20."""
    head, extent = (8, 16) if style is HeaderStyle.EXTENDED else (4, 8)
    count, rest = divmod(length - head, extent)
    return rest == 0 and 1 <= count <= MAX_EXTENTS


def decode_block_status(style: HeaderStyle, payload: Bytes) -> tuple[int, NDArray[np.uint64]]:
    """Decode a block status payload: context id, (n, 2) array of length and flags.

    NBD_REPLY_TYPE_BLOCK_STATUS:

    | S: 32 bits, context id
    | S: 32 bits, length; 32 bits, flags; as often as fits, at least once

    NBD_REPLY_TYPE_BLOCK_STATUS_EXT:

    | S: 32 bits, context id
    | S: 32 bits, number of descriptors
    | S: 64 bits, length; 64 bits, flags; so many times

    The lengths are unchecked; the caller has checked `status_length_legal`.
    """
    import numpy as np  # here: a tenth of a second that the handshake need not wait for

    if style is HeaderStyle.EXTENDED:
        context, count = _STATUS_EXT.unpack_from(payload)
        if len(payload) != 8 + 16 * count:
            raise NBDProtocolError(
                f"a block status chunk of {len(payload)} bytes claims {count} extents"
            )
        raw = np.frombuffer(payload, dtype=">u8", offset=8)
    else:
        context = _U32.unpack_from(payload)[0]
        raw = np.frombuffer(payload, dtype=">u4", offset=4)
    return context, raw.reshape(-1, 2).astype(np.uint64)


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
