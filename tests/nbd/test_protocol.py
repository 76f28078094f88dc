"""The protocol as a whole: any split of the bytes, any bytes at all, bounded memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable

import fake_server as fake
import numpy as np
import pytest
from driving import finished, honest_handshake, new, opened, sent
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.errors import NBDConnectError, NBDDisconnectedError, NBDError, UnsupportedError
from qmpblock.nbd.protocol import Event, Finished, Opened, Protocol, Wanted
from qmpblock.nbd.wire import Command

CONTEXTS = {7: "base:allocation", 9: "qemu:allocation-depth"}
DOCUMENTED = NBDError | UnsupportedError


def _conversation(style: str) -> tuple[fake.Settings, bytes, bytes]:
    """Return settings, what the server says in the handshake, and its replies to `_ask`."""
    contexts = {} if style == fake.SIMPLE else CONTEXTS
    chosen = fake.Settings(style=style, contexts=contexts, block_sizes=(1, 4096, 1 << 25))
    if style == fake.SIMPLE:
        replies = fake.simple(2) + fake.simple(1, 0, bytes(range(200))) + fake.simple(3, 5)
        return chosen, honest_handshake(chosen), replies

    def chunk(cookie: int, kind: int, payload: bytes = b"", done: bool = False) -> bytes:
        offset = {1: 1000, 2: 0, 3: 0, 4: 0}[cookie]
        return fake.chunk(style, cookie, kind, payload, done=done, offset=offset)

    status = fake.STATUS_EXT if style == fake.EXTENDED else fake.STATUS
    replies = b"".join(
        [
            chunk(1, fake.DATA, fake.data_payload(1100, bytes(range(100)))),
            chunk(4, status, fake.status_payload(style, 9, [(4096, 1), (10**6, 2)])),
            chunk(2, fake.NONE, done=True),
            chunk(1, fake.HOLE, fake.hole_payload(1000, 100)),
            chunk(3, fake.ERROR, fake.error_payload(5, b"no")),
            chunk(4, status, fake.status_payload(style, 7, [(4096, 3)]), done=True),
            chunk(3, fake.NONE, done=True),
            chunk(1, fake.NONE, done=True),
        ]
    )
    return chosen, honest_handshake(chosen), replies


def _ask(protocol: Protocol) -> list[bytearray]:
    data = bytearray(200)
    protocol.send_read(1000, memoryview(data))
    protocol.send_write(0, b"abc")
    protocol.send_command(Command.FLUSH)
    if protocol.session.contexts:
        protocol.send_block_status(0, 65536)
    return [data]


def _plain(event: Event) -> object:
    """Make an event comparable."""
    if not isinstance(event, Finished):
        return event
    result = event.result
    if isinstance(result, memoryview):
        result = bytes(result)  # type: ignore[assignment]
    elif result is not None:
        result = {name: array.tolist() for name, array in result.items()}  # type: ignore
    return event.cookie, result, str(event.error)


def _hear(protocol: Protocol, pieces: list[bytes], feed: Callable[[Protocol, bytes], None]):
    events = []
    for piece in pieces:
        feed(protocol, piece)
        events += [_plain(e) for e in protocol.events_received()]
    return events


def _by_copy(protocol: Protocol, piece: bytes) -> None:
    protocol.receive_data(piece)


def _in_place(protocol: Protocol, piece: bytes) -> None:
    while piece:
        buffer = protocol.get_buffer()
        length = min(len(buffer), len(piece))
        buffer[:length] = piece[:length]
        protocol.buffer_updated(length)
        piece = piece[length:]


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({c % (len(data) + 1) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("feed", [_by_copy, _in_place])
@pytest.mark.parametrize("style", fake.STYLES)
@given(cuts=st.lists(st.integers(0, 5000), max_size=60))
def test_any_split_of_the_bytes_gives_the_same_events(feed, style: str, cuts: list[int]):
    chosen, handshake, replies = _conversation(style)
    results = []
    for pieces in ([handshake], [replies]), (_split(handshake, cuts), _split(replies, cuts)):
        protocol = new(chosen)
        events = _hear(protocol, pieces[0], feed)
        assert len(events) == 1
        assert isinstance(events[0], Opened)
        data = _ask(protocol)
        events += _hear(protocol, pieces[1], feed)
        assert protocol.failure is None
        assert protocol.in_flight == 0
        results.append((events, data, sent(protocol)))
    assert results[0] == results[1]
    assert len(results[0][0]) == (4 if style == fake.SIMPLE else 5)


@pytest.mark.parametrize("style", fake.STYLES)
def test_single_bytes_give_the_same_events(style: str):
    chosen, handshake, replies = _conversation(style)
    protocol = new(chosen)
    _hear(protocol, [bytes([b]) for b in handshake], _in_place)
    _ask(protocol)
    events = _hear(protocol, [bytes([b]) for b in replies], _in_place)
    assert len(events) == (3 if style == fake.SIMPLE else 4)


def _survives(protocol: Protocol, data: bytes) -> None:
    """Feed bytes; nothing but a documented failure may come of it."""
    protocol.receive_data(data)
    protocol.events_received()
    protocol.data_to_send()
    protocol.receive_eof()
    assert isinstance(protocol.failure, DOCUMENTED)
    protocol.receive_data(b"more")
    assert protocol.events_received() == []


@given(st.binary(max_size=4096), st.sampled_from([b"", b"NBDMAGIC", fake.greeting()]))
def test_random_bytes_in_the_handshake(data: bytes, prefix: bytes):
    _survives(new(fake.Settings(contexts=CONTEXTS)), prefix + data)


@given(st.binary(max_size=4096), st.sampled_from(fake.STYLES))
def test_random_bytes_in_transmission(data: bytes, style: str):
    chosen, _, _ = _conversation(style)
    protocol = opened(chosen)
    _ask(protocol)
    _survives(protocol, data)


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "repeat"]),
        st.integers(0, 10**6),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=8,
)


def _mutate(data: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    changed = bytearray(data)
    for kind, where, value in mutations:
        at = where % max(len(changed), 1)
        if kind == "flip" and changed:
            changed[at] ^= value
        elif kind == "insert":
            changed[at:at] = bytes([value]) * (value % 9)
        elif kind == "delete":
            del changed[at : at + value % 9]
        else:
            changed[at:at] = changed[at : at + value]
    return bytes(changed)


@pytest.mark.parametrize("style", fake.STYLES)
@settings(max_examples=300)
@given(mutations=MUTATIONS)
def test_mutated_replies(style: str, mutations: list[tuple[str, int, int]]):
    chosen, _, replies = _conversation(style)
    protocol = opened(chosen)
    _ask(protocol)
    _survives(protocol, _mutate(replies, mutations))


@pytest.mark.parametrize("style", fake.STYLES)
@settings(max_examples=300)
@given(mutations=MUTATIONS)
def test_a_mutated_handshake(style: str, mutations: list[tuple[str, int, int]]):
    chosen, handshake, _ = _conversation(style)
    _survives(new(chosen), _mutate(handshake, mutations))


def test_no_exception_is_shared_between_those_who_are_told():
    protocol = new()
    protocol.receive_eof()
    one, two = protocol.dead(), protocol.dead()
    assert one is not two
    assert type(one) is type(two) is NBDConnectError
    assert str(one) == str(two) == str(protocol.failure)


def test_requests_before_the_export_is_open():
    protocol = new()
    with pytest.raises(NBDConnectError):
        protocol.send_command(Command.FLUSH)
    with pytest.raises(NBDConnectError):
        _ = protocol.session
    assert protocol.in_flight == 0


def test_a_read_lands_in_its_buffer_and_is_not_stored_besides():
    protocol = opened(fake.Settings(size=1 << 30, block_sizes=(1, 4096, 1 << 25)))
    length = 32 << 20
    data = bytearray(length)
    cookie = protocol.send_read(0, memoryview(data))
    head = fake.chunk(fake.STRUCTURED, cookie, fake.DATA, bytes(8), done=True, length=length + 8)
    tracemalloc.start()
    try:
        protocol.receive_data(head)
        assert len(protocol.get_buffer()) == length  # the network writes where it belongs
        piece = memoryview(b"x" * (1 << 20))
        for _ in range(32):
            protocol.receive_data(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert finished(protocol.events_received()).result == data
    assert peak < 4 << 20


def test_a_lying_server_cannot_make_memory_grow():
    """Endless option replies, and the largest announcements there are."""
    tracemalloc.start()
    try:
        protocol = Protocol(Wanted(queries=()))
        protocol.receive_data(fake.greeting())
        protocol.receive_data(fake.option_reply(fake.EXTENDED_HEADERS, fake.ACK))
        name = "x:" + "y" * 90
        for number in range(9000):
            protocol.receive_data(fake.context_reply(number, name, fake.LIST_CONTEXTS))
        assert protocol.failure is not None
        chosen = fake.Settings(style=fake.EXTENDED, contexts=CONTEXTS)
        for length in (2**64 - 1, 2**32, 8 + 16 * (2**20 + 1)):
            protocol = opened(chosen)
            cookie = protocol.send_block_status(0, 4096)
            protocol.receive_data(fake.chunk(fake.EXTENDED, cookie, fake.STATUS_EXT, length=length))
            assert protocol.failure is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_the_largest_block_status_is_quickly_parsed():
    count = 1 << 20
    protocol = opened(fake.Settings(size=1 << 40, contexts={7: "base:allocation"}))
    cookie = protocol.send_block_status(0, 512 * count)
    extents = np.empty((count, 2), dtype=">u4")
    extents[:, 0] = 512
    extents[:, 1] = np.arange(count) % 4
    payload = (7).to_bytes(4) + extents.tobytes()
    protocol.receive_data(fake.chunk(fake.STRUCTURED, cookie, fake.STATUS, payload, done=True))
    result = finished(protocol.events_received()).result
    assert isinstance(result, dict)
    assert (result["base:allocation"] == extents).all()


def test_the_end_between_requests_is_no_protocol_error():
    protocol = opened()
    protocol.receive_eof()
    assert isinstance(protocol.failure, NBDDisconnectedError)
