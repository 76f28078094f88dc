"""Requests and replies: honest ones of every kind, and each lie by its name."""

from __future__ import annotations

import struct

import fake_server as fake
import pytest
from driving import finished, opened, sent

from qmpblock.errors import NBDDisconnectedError, NBDProtocolError, NBDRequestError, RequestError
from qmpblock.nbd.protocol import Protocol
from qmpblock.nbd.wire import Command, CommandFlag

STYLES = pytest.mark.parametrize("style", fake.STYLES)
CHUNKED = pytest.mark.parametrize("style", [fake.STRUCTURED, fake.EXTENDED])
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
CONTEXTS = {7: BASE, 9: DEPTH}


def _open(style: str, **more: object) -> Protocol:
    contexts = {} if style == fake.SIMPLE else CONTEXTS
    return opened(fake.Settings(style=style, contexts=contexts, **more))  # type: ignore[arg-type]


def _read(style: str, offset: int = 0, length: int = 12, flags: CommandFlag = CommandFlag.NONE):
    protocol = _open(style)
    data = bytearray(length)
    cookie = protocol.send_read(offset, memoryview(data), flags)

    def chunk(kind: int, payload: bytes = b"", **more: object) -> None:
        said = fake.chunk(style, cookie, kind, payload, **{"offset": offset, **more})  # type: ignore[arg-type]
        protocol.receive_data(said)

    return protocol, data, chunk


def _fatal(protocol: Protocol) -> str:
    assert isinstance(protocol.failure, NBDProtocolError), protocol.failure
    assert protocol.events_received() == []
    return str(protocol.failure)


# -- what is sent


def test_a_write_in_compact_headers():
    protocol = _open(fake.STRUCTURED)
    protocol.send_write(4096, b"abc", CommandFlag.FUA)
    assert sent(protocol) == struct.pack(">IHHQQI", 0x25609513, 1, 1, 1, 4096, 3) + b"abc"


def test_a_write_in_extended_headers_says_that_a_payload_follows():
    protocol = _open(fake.EXTENDED)
    protocol.send_write(4096, b"abc")
    assert sent(protocol) == struct.pack(">IHHQQQ", 0x21E41C71, 32, 1, 1, 4096, 3) + b"abc"


def test_a_refused_request_is_not_sent():
    protocol = _open(fake.STRUCTURED)
    with pytest.raises(RequestError):
        protocol.send_write(fake.MIB, b"x")
    assert sent(protocol) == b""
    assert protocol.in_flight == 0


@STYLES
def test_leave_is_taken_once_and_is_all(style: str):
    protocol = _open(style)
    assert protocol.send_leave()
    protocol.send_leave()
    assert sent(protocol)[4:8] == struct.pack(">HH", 0, 2)
    assert sent(protocol) == b""
    with pytest.raises(NBDDisconnectedError, match="by us"):
        protocol.send_command(Command.FLUSH)
    protocol.receive_data(b"garbage in reply to DISC")
    protocol.receive_eof()
    assert protocol.failure is None


def test_an_impolite_client_takes_no_leave():
    protocol = opened(polite=False)
    assert not protocol.send_leave()
    assert sent(protocol) == b""


# -- honest replies


def test_a_simple_read():
    protocol = _open(fake.SIMPLE)
    data = bytearray(5)
    cookie = protocol.send_read(3, memoryview(data))
    protocol.receive_data(fake.simple(cookie, 0, b"hello"))
    assert finished(protocol.events_received()).result == b"hello"
    assert data == b"hello"


@CHUNKED
def test_chunks_in_any_order_cover_the_read(style: str):
    protocol, data, chunk = _read(style, 100)
    data[:] = b"x" * 12
    chunk(fake.DATA, fake.data_payload(108, b"IJKL"))
    chunk(fake.DATA, fake.data_payload(100, b"ABCD"))
    chunk(fake.HOLE, fake.hole_payload(104, 4))
    assert protocol.events_received() == []
    chunk(fake.NONE, done=True)
    assert finished(protocol.events_received()).error is None
    assert data == b"ABCD\0\0\0\0IJKL"


@CHUNKED
def test_a_content_chunk_may_be_the_last(style: str):
    protocol, _data, chunk = _read(style)
    chunk(fake.DATA, fake.data_payload(0, b"ABCDEFGHIJKL"), done=True)
    assert finished(protocol.events_received()).result == b"ABCDEFGHIJKL"


@CHUNKED
def test_replies_interleave(style: str):
    protocol = _open(style)
    first, second = bytearray(4), bytearray(4)
    one = protocol.send_read(0, memoryview(first))
    two = protocol.send_read(4, memoryview(second))
    three = protocol.send_command(Command.FLUSH)
    for cookie, kind, payload, done, offset in [
        (two, fake.DATA, fake.data_payload(4, b"EF"), False, 4),
        (one, fake.DATA, fake.data_payload(2, b"CD"), False, 0),
        (three, fake.NONE, b"", True, 0),
        (two, fake.DATA, fake.data_payload(6, b"GH"), True, 4),
        (one, fake.DATA, fake.data_payload(0, b"AB"), True, 0),
    ]:
        said = fake.chunk(style, cookie, kind, payload, done=done, offset=offset)
        protocol.receive_data(said)
    events = protocol.events_received()
    assert [e.cookie for e in events] == [three, two, one]  # type: ignore[union-attr]
    assert (first, second) == (b"ABCD", b"EFGH")


@STYLES
def test_an_error_fails_one_request_and_leaves_the_others(style: str):
    protocol = _open(style)
    one = protocol.send_write(0, b"abc")
    two = protocol.send_command(Command.FLUSH)
    if style == fake.SIMPLE:
        protocol.receive_data(fake.simple(one, 28))
        protocol.receive_data(fake.simple(two))
    else:
        text = fake.error_payload(28, b"disk \x1b[31mfull")
        protocol.receive_data(fake.chunk(style, one, fake.ERROR, text, done=True))
        protocol.receive_data(fake.chunk(style, two, fake.NONE, done=True))
    failed, done = protocol.events_received()
    assert isinstance(failed.error, NBDRequestError)  # type: ignore[union-attr]
    assert failed.error.errno == 28  # type: ignore[union-attr]
    assert "WRITE 0+3 with ENOSPC" in str(failed.error)  # type: ignore[union-attr]
    assert "\x1b" not in str(failed.error)  # type: ignore[union-attr]
    assert done.error is None  # type: ignore[union-attr]


def test_a_structured_server_may_answer_simply_where_there_is_no_content():
    protocol = _open(fake.STRUCTURED)
    cookie = protocol.send_command(Command.CACHE, 0, 4096)
    protocol.receive_data(fake.simple(cookie))
    assert finished(protocol.events_received()).error is None
    cookie = protocol.send_block_status(0, 4096)
    protocol.receive_data(fake.simple(cookie, 22))
    error = finished(protocol.events_received()).error
    assert error is not None
    assert error.errno == 22


@CHUNKED
def test_an_error_with_an_offset_fails_the_read_however_it_goes_on(style: str):
    protocol, _, chunk = _read(style)
    chunk(fake.DATA, fake.data_payload(0, b"ABCD"))
    chunk(fake.ERROR_OFFSET, fake.error_payload(5, b"bad sector", 2))
    chunk(fake.ERROR_OFFSET, fake.error_payload(28, b"worse", 8))
    chunk(fake.HOLE, fake.hole_payload(4, 4))
    chunk(fake.NONE, done=True)
    error = finished(protocol.events_received()).error
    assert error is not None
    assert error.errno == 5
    assert "bad sector (at offset 2)" in str(error)
    assert protocol.failure is None


@CHUNKED
def test_an_unknown_kind_of_error_is_an_error(style: str):
    protocol, _, chunk = _read(style)
    chunk(0x8099, fake.error_payload(5, b"new") + b"fields", done=True)
    assert finished(protocol.events_received()).error is not None


@CHUNKED
def test_unknown_chunk_flags_are_ignored(style: str):
    protocol = _open(style)
    cookie = protocol.send_command(Command.FLUSH)
    said = bytearray(fake.chunk(style, cookie, fake.NONE, done=True))
    said[4] = 0x80
    protocol.receive_data(said)
    assert finished(protocol.events_received()).error is None


def test_a_server_that_shuts_down_gets_no_more_requests():
    protocol = _open(fake.STRUCTURED)
    cookie = protocol.send_command(Command.FLUSH)
    protocol.receive_data(fake.simple(cookie, 108))
    assert finished(protocol.events_received()).error is not None
    with pytest.raises(NBDDisconnectedError, match="shutting down"):
        protocol.send_command(Command.FLUSH)
    sent(protocol)
    assert protocol.send_leave()
    assert sent(protocol)


# -- block status


def _status(style: str, *said: tuple[int, list[tuple[int, int]]], length: int = 1000, one=False):
    protocol = _open(style)
    flags = CommandFlag.REQ_ONE if one else CommandFlag.NONE
    cookie = protocol.send_block_status(0, length, flags)
    for context, extents in said:
        payload = fake.status_payload(style, context, extents)
        kind = fake.STATUS_EXT if style == fake.EXTENDED else fake.STATUS
        protocol.receive_data(fake.chunk(style, cookie, kind, payload))
    protocol.receive_data(fake.chunk(style, cookie, fake.NONE, done=True))
    return protocol


@CHUNKED
def test_each_context_has_its_extents_cut_to_the_request(style: str):
    protocol = _status(style, (9, [(400, 1), (9999, 2)]), (7, [(100, 3), (200, 0)]))
    result = finished(protocol.events_received()).result
    assert {name: array.tolist() for name, array in result.items()} == {  # type: ignore[union-attr]
        BASE: [[100, 3], [200, 0]],
        DEPTH: [[400, 1], [600, 2]],
    }


@CHUNKED
def test_one_extent_of_each_context(style: str):
    protocol = _status(style, (9, [(1000, 1)]), (7, [(1, 3)]), one=True)
    assert finished(protocol.events_received()).error is None


def test_extents_that_end_between_blocks_are_cut_to_a_boundary():
    settings = fake.Settings(contexts={7: BASE}, block_sizes=(512, 4096, 1 << 25))
    for said, kept in [
        ([(512, 1), (700, 2)], [[512, 1], [512, 2]]),
        ([(512, 1), (512, 2), (100, 3)], [[512, 1], [512, 2]]),
        ([(600, 1), (3496, 2)], [[600, 1], [3496, 2]]),  # the end of the request
    ]:
        protocol = opened(settings)
        cookie = protocol.send_block_status(0, 4096)
        payload = fake.status_payload(fake.STRUCTURED, 7, said)
        protocol.receive_data(fake.chunk(fake.STRUCTURED, cookie, fake.STATUS, payload, done=True))
        assert finished(protocol.events_received()).result[BASE].tolist() == kept  # type: ignore


_GOOD = (9, [(100, 0)])
STATUS_LIES = {
    "zero length": ("length 0", [_GOOD, (7, [(100, 0), (0, 1), (100, 0)])]),
    "zero length at the end": ("length 0", [_GOOD, (7, [(100, 0), (0, 1)])]),
    "unknown context": ("never negotiated", [_GOOD, (8, [(100, 0)])]),
    "context twice": ("twice", [_GOOD, _GOOD]),
    "context missing": ("says nothing of", [_GOOD]),
    "nothing at all": ("says nothing of", []),
    "extent past the end": ("past the end", [_GOOD, (7, [(1000, 0), (1, 0)])]),
}


@CHUNKED
@pytest.mark.parametrize("lie", STATUS_LIES)
def test_a_lying_block_status_is_fatal(style: str, lie: str):
    words, said = STATUS_LIES[lie]
    told = _fatal(_status(style, *said))
    assert "BLOCK_STATUS 0+1000" in told
    assert words in told


@CHUNKED
@pytest.mark.parametrize("extents", [[(1, 0), (1, 0)], [(1001, 0)]])
def test_more_than_one_extent_is_fatal_where_one_was_asked(style: str, extents):
    assert "one extent" in _fatal(_status(style, (7, extents), one=True))


def test_extents_whose_sum_wraps_are_fatal():
    half = 1 << 63
    extents = [(half, 0), (half, 0), (10, 0), (10, 0)]
    assert "past the end" in _fatal(_status(fake.EXTENDED, (7, extents)))


@CHUNKED
@pytest.mark.parametrize("length", [0, 4, 11, 2**32 - 4, 4 + 8 * (2**20 + 1), 8 + 16 * (2**20 + 1)])
def test_a_block_status_of_impossible_length_is_fatal_before_it_is_stored(style: str, length: int):
    protocol = _open(style)
    cookie = protocol.send_block_status(0, 1000)
    kind = fake.STATUS_EXT if style == fake.EXTENDED else fake.STATUS
    protocol.receive_data(fake.chunk(style, cookie, kind, length=length))
    assert f"{length} bytes" in _fatal(protocol)


@pytest.mark.parametrize(
    ("style", "kind"), [(fake.STRUCTURED, fake.STATUS_EXT), (fake.EXTENDED, fake.STATUS)]
)
def test_a_block_status_of_the_other_width_is_fatal(style: str, kind: int):
    protocol = _open(style)
    cookie = protocol.send_block_status(0, 1000)
    protocol.receive_data(fake.chunk(style, cookie, kind, length=24))
    assert "does not belong" in _fatal(protocol)


# -- lies about reads

DATA, HOLE, NONE = fake.DATA, fake.HOLE, fake.NONE
READ_LIES = {
    "data before the request": [(DATA, fake.data_payload(99, b"ab"))],
    "data past the request": [(DATA, fake.data_payload(108, b"abcde"))],
    "data far away": [(DATA, fake.data_payload(2**64 - 4, b"abcd"))],
    "empty data": [(DATA, fake.data_payload(100, b""))],
    "hole past the request": [(HOLE, fake.hole_payload(100, 13))],
    "empty hole": [(HOLE, fake.hole_payload(100, 0))],
    "hole of 4 GiB": [(HOLE, fake.hole_payload(100, 2**32 - 1))],
    "data twice": [(DATA, fake.data_payload(100, b"abcd"))] * 2,
    "data over the end of data": [
        (DATA, fake.data_payload(100, b"abcd")),
        (DATA, fake.data_payload(103, b"abcd")),
    ],
    "data over the beginning of data": [
        (DATA, fake.data_payload(104, b"abcd")),
        (DATA, fake.data_payload(102, b"abcd")),
    ],
    "data over a hole": [
        (HOLE, fake.hole_payload(104, 4)),
        (DATA, fake.data_payload(100, b"abcdefghijkl")),
    ],
    "done too early": [(DATA, fake.data_payload(100, b"abcd")), (NONE, b"", {"done": True})],
    "the beginning is missing": [(DATA, fake.data_payload(104, b"efghijkl"), {"done": True})],
    "nothing": [(NONE, b"", {"done": True})],
    "done, but in the middle": [
        (DATA, fake.data_payload(100, b"abcd")),
        (DATA, fake.data_payload(108, b"ijkl"), {"done": True}),
    ],
    "none that is not the last": [(NONE, b"")],
    "none with a payload": [(NONE, b"x", {"done": True})],
    "data longer than the request": [(DATA, b"", {"length": 21})],
    "data without an offset": [(DATA, b"", {"length": 7})],
    "data of 4 GiB": [(DATA, b"", {"length": 2**32 - 1})],
    "hole of odd length": [(HOLE, b"", {"length": 13})],
    "block status": [(fake.STATUS, b"", {"length": 12})],
    "unknown chunk": [(3, b"", {"length": 0})],
    "error that is too short": [(fake.ERROR, b"", {"length": 5})],
    "error that is too long": [(fake.ERROR, b"", {"length": 5000})],
    "error number 0": [(fake.ERROR, fake.error_payload(0))],
    "error text longer than the chunk": [(fake.ERROR, struct.pack(">IH", 5, 1))],
    "error outside the request": [(fake.ERROR_OFFSET, fake.error_payload(5, b"", 112))],
    "endless errors": [(fake.ERROR, fake.error_payload(5))] * 2000,
}


WORDS = {
    "it sends ": {"data before the request", "data past the request", "empty hole",
                   "hole past the request", "hole of 4 GiB", "data far away"},
    "twice": {"data twice", "data over the end of data", "data over the beginning of data",
              "data over a hole"},
    "without all of the data": {"done too early", "the beginning is missing", "nothing",
                                "done, but in the middle"},
    "an empty chunk": {"none that is not the last", "none with a payload"},
    "a data chunk announces": {"empty data", "data longer than the request", "data of 4 GiB",
                               "data without an offset"},
    "a hole chunk announces": {"hole of odd length"},
    "does not belong": {"block status", "unknown chunk"},
    "an error chunk": {"error that is too short", "error that is too long", "error number 0",
                       "error text longer than the chunk"},
    "outside the request": {"error outside the request"},
    "does not end": {"endless errors"},
}  # fmt: skip


@CHUNKED
@pytest.mark.parametrize("lie", READ_LIES)
def test_a_lying_read_is_fatal(style: str, lie: str):
    protocol, _, chunk = _read(style, 100)
    for kind, payload, *more in READ_LIES[lie]:
        chunk(kind, payload, **(more[0] if more else {}))
    told = _fatal(protocol)
    assert [words for words, lies in WORDS.items() if lie in lies and words in told], told


def test_a_reply_in_single_bytes_without_end_is_fatal():
    protocol, _, chunk = _read(fake.STRUCTURED, length=4096)
    for at in range(2000):
        chunk(DATA, fake.data_payload(at, b"x"))
    assert "does not end" in _fatal(protocol)


@CHUNKED
def test_a_fragmented_reply_is_fatal_where_df_was_sent(style: str):
    protocol, _, chunk = _read(style, flags=CommandFlag.DF)
    chunk(DATA, fake.data_payload(0, b"abcd"))
    chunk(DATA, fake.data_payload(4, b"efgh"))
    assert "DF" in _fatal(protocol)


# -- lies about anything


@STYLES
@pytest.mark.parametrize("cookie", [0, 2, 2**64 - 1])
def test_an_unknown_cookie_is_fatal(style: str, cookie: int):
    protocol = _open(style)
    protocol.send_command(Command.FLUSH)
    if style == fake.SIMPLE:
        protocol.receive_data(fake.simple(cookie))
    else:
        protocol.receive_data(fake.chunk(style, cookie, NONE, done=True))
    assert "not in flight" in _fatal(protocol)


@STYLES
def test_a_second_reply_is_fatal(style: str):
    protocol = _open(style)
    cookie = protocol.send_command(Command.FLUSH)
    said = (
        fake.simple(cookie) if style == fake.SIMPLE else fake.chunk(style, cookie, NONE, done=True)
    )
    protocol.receive_data(said)
    assert finished(protocol.events_received()).error is None
    protocol.receive_data(said)
    _fatal(protocol)


@STYLES
def test_a_reply_without_a_request_is_fatal(style: str):
    protocol = _open(style)
    protocol.receive_data(fake.simple(1) + bytes(16))
    _fatal(protocol)


@STYLES
def test_a_wrong_magic_is_fatal(style: str):
    protocol = _open(style)
    protocol.send_command(Command.FLUSH)
    protocol.receive_data(b"NBDMAGIC" * 4)
    assert "begins with 0x4e42444d" in _fatal(protocol)


@pytest.mark.parametrize(
    ("negotiated", "used"),
    [
        (fake.SIMPLE, fake.STRUCTURED),
        (fake.SIMPLE, fake.EXTENDED),
        (fake.STRUCTURED, fake.EXTENDED),
        (fake.EXTENDED, fake.STRUCTURED),
        (fake.EXTENDED, fake.SIMPLE),
    ],
)
def test_a_reply_in_another_style_than_agreed_is_fatal(negotiated: str, used: str):
    protocol = _open(negotiated)
    cookie = protocol.send_command(Command.FLUSH)
    said = fake.simple(cookie) if used == fake.SIMPLE else fake.chunk(used, cookie, NONE, done=True)
    protocol.receive_data(said + bytes(32))
    _fatal(protocol)


def test_a_simple_reply_to_a_structured_read_is_fatal():
    protocol, _, _ = _read(fake.STRUCTURED)
    protocol.receive_data(fake.simple(1, 5))
    assert "simple reply" in _fatal(protocol)


def test_a_simple_success_of_a_block_status_is_fatal():
    protocol = _open(fake.STRUCTURED)
    protocol.receive_data(fake.simple(protocol.send_block_status(0, 1000)))
    assert "says nothing" in _fatal(protocol)


def test_a_simple_reply_after_chunks_is_fatal():
    protocol = _open(fake.STRUCTURED)
    cookie = protocol.send_command(Command.FLUSH)
    protocol.receive_data(fake.chunk(fake.STRUCTURED, cookie, fake.ERROR, fake.error_payload(5)))
    protocol.receive_data(fake.simple(cookie))
    assert "follows" in _fatal(protocol)


def test_an_extended_reply_with_another_offset_is_fatal():
    protocol, _, chunk = _read(fake.EXTENDED, 100)
    chunk(DATA, fake.data_payload(100, b"ABCDEFGHIJKL"), offset=104)
    assert "offset 104" in _fatal(protocol)


@CHUNKED
@pytest.mark.parametrize("kind", [DATA, HOLE, fake.STATUS, fake.STATUS_EXT])
def test_content_for_a_command_without_any_is_fatal(style: str, kind: int):
    protocol = _open(style)
    cookie = protocol.send_command(Command.CACHE, 0, 4096)
    protocol.receive_data(fake.chunk(style, cookie, kind, length=24))
    assert "does not belong" in _fatal(protocol)


@STYLES
def test_the_end_of_the_stream(style: str):
    protocol = _open(style)
    protocol.receive_eof()
    assert isinstance(protocol.failure, NBDDisconnectedError)
    assert protocol.failure.standing is None
    protocol = _open(style)
    protocol.send_command(Command.FLUSH)
    protocol.receive_eof()
    assert isinstance(protocol.failure, NBDDisconnectedError)
    assert "unknown" in (protocol.failure.standing or "")
    with pytest.raises(NBDDisconnectedError):
        protocol.send_command(Command.FLUSH)
