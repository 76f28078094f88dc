"""Codecs against bytes written down from the specification."""

from __future__ import annotations

import struct

import fake_server as fake
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import NBDProtocolError
from qmpblock.nbd import wire
from qmpblock.nbd.wire import Command, HeaderStyle, Info, Option

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def test_an_option():
    assert (
        wire.encode_option(Option.GO, b"xy")
        == b"IHAVEOPT" + bytes.fromhex("0000000700000002") + b"xy"
    )


def test_the_data_of_go():
    assert wire.encode_go("é".encode(), [Info.BLOCK_SIZE]).hex() == "00000002c3a900010003"


def test_the_data_of_set_meta_context():
    assert wire.encode_contexts(b"e", [b"a:b", b"c:"]) == (
        bytes.fromhex("00000001") + b"e" + bytes.fromhex("00000002")
        + bytes.fromhex("00000003") + b"a:b" + bytes.fromhex("00000002") + b"c:"
    )  # fmt: skip


def test_a_compact_request():
    assert (
        wire.encode_request(HeaderStyle.STRUCTURED, 8, Command.BLOCK_STATUS, 3, 4, 5).hex()
        == "25609513"
        "0008"
        "0007"
        "0000000000000003"
        "0000000000000004"
        "00000005"
    )


def test_an_extended_request():
    assert (
        wire.encode_request(HeaderStyle.EXTENDED, 32, Command.WRITE, 3, 4, 1 << 32).hex()
        == "21e41c71"
        "0020"
        "0001"
        "0000000000000003"
        "0000000000000004"
        "0000000100000000"
    )


@given(st.integers(0, 65535), st.integers(0, 65535), U64, U64, U32)
def test_chunk_headers_round_trip(flags: int, kind: int, cookie: int, offset: int, length: int):
    done = bool(flags & 1)
    structured = fake.chunk(fake.STRUCTURED, cookie, kind, done=done, length=length)
    assert wire.decode_structured_reply(structured) == (done, kind, cookie, None, length)
    extended = fake.chunk(fake.EXTENDED, cookie, kind, done=done, length=length, offset=offset)
    assert wire.decode_extended_reply(extended) == (done, kind, cookie, offset, length)


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">QIII", 0x3E889045565A8, 7, 1, 0),
        struct.pack(">QIII", 0x3E889045565A9, 7, 1, 8193),
    ],
    ids=["magic", "length"],
)
def test_an_option_reply_is_refused_for_its(reply: bytes):
    with pytest.raises(NBDProtocolError):
        wire.decode_option_reply(reply)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">HQHB", 0, 5, 1, 0),
        struct.pack(">HQ", 0, 5),
        struct.pack(">HQH", 0, 1 << 63, 1),
        struct.pack(">HQH", 0, 5, 2),
    ],
    ids=["long", "short", "size of 2^63", "no HAS_FLAGS"],
)
def test_export_information_is_refused(data: bytes):
    with pytest.raises(NBDProtocolError):
        wire.decode_info_export(data)


def test_an_export_may_be_empty_or_as_large_as_an_off_t():
    for size in (0, 2**63 - 1):
        assert wire.decode_info_export(struct.pack(">HQH", 0, size, 1)) == (size, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4096, 1 << 25),
        (3, 4096, 1 << 25),
        (131072, 131072, 1 << 25),
        (1, 256, 1 << 25),
        (4096, 512, 1 << 25),
        (1, 5000, 1 << 25),
        (1, 4096, 4095),
    ],
)
def test_block_sizes_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(NBDProtocolError):
        wire.decode_info_block_size(struct.pack(">HIII", 3, *sizes))


@pytest.mark.parametrize(
    "sizes",
    [(1, 512, 512), (512, 4096, 5000), (65536, 65536, 0xFFFFFFFF), (1, 1 << 31, 1 << 31)],
)
def test_block_sizes_are_accepted(sizes: tuple[int, int, int]):
    assert wire.decode_info_block_size(struct.pack(">HIII", 3, *sizes)) == sizes


def test_block_size_information_has_14_bytes():
    with pytest.raises(NBDProtocolError):
        wire.decode_info_block_size(struct.pack(">HIIIB", 3, 1, 4096, 1 << 25, 0))


@pytest.mark.parametrize(
    "data", [b"\0\0\0\1", b"\0\0", b"\0\0\0\1\xff:", b"\0\0\0\1" + b"a" * 4097]
)
def test_a_context_is_refused(data: bytes):
    with pytest.raises(NBDProtocolError):
        wire.decode_meta_context(data)


def test_a_context():
    assert wire.decode_meta_context(b"\0\0\1\0base:allocation") == (256, "base:allocation")


@given(st.integers(1, 2**32 - 1), st.binary(max_size=100), U64)
def test_errors_round_trip(error: int, text: bytes, offset: int):
    plain = wire.decode_error(fake.ERROR, fake.error_payload(error, text))
    assert (plain.error, plain.offset) == (error, None)
    placed = wire.decode_error(fake.ERROR_OFFSET, fake.error_payload(error, text, offset))
    assert (placed.error, placed.offset) == (error, offset)


def test_an_error_text_that_is_not_utf8_is_shown_escaped():
    assert wire.decode_error(fake.ERROR, fake.error_payload(5, b"\xff!")).text == "\\xff!"


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (fake.ERROR, b"\0\0\0\5\0"),
        (fake.ERROR, fake.error_payload(0, b"fine")),
        (fake.ERROR, struct.pack(">IH", 5, 9) + b"12345678"),
        (fake.ERROR, struct.pack(">IH", 5, 4097) + bytes(4097)),
        (fake.ERROR_OFFSET, fake.error_payload(5, b"1234567")),
    ],
    ids=["short", "zero", "text longer than the chunk", "text over 4096", "no offset"],
)
def test_an_error_chunk_is_refused(kind: int, payload: bytes):
    with pytest.raises(NBDProtocolError):
        wire.decode_error(kind, payload)


def test_an_unknown_error_type_may_add_fields():
    assert wire.decode_error(0x8003, fake.error_payload(5, b"no") + b"more") == (5, "no", None)


@given(
    st.sampled_from([(fake.STRUCTURED, U32), (fake.EXTENDED, U64)]).flatmap(
        lambda s: st.tuples(
            st.just(s[0]), U32, st.lists(st.tuples(s[1], s[1]), min_size=1, max_size=50)
        )
    )
)
def test_block_status_round_trips(case: tuple[str, int, list[tuple[int, int]]]):
    style, context, extents = case
    payload = fake.status_payload(style, context, extents)
    style = HeaderStyle[style.upper()]
    assert wire.status_length_legal(style, len(payload))
    found, array = wire.decode_block_status(style, payload)
    assert found == context
    assert array.dtype == "uint64"
    assert [tuple(row) for row in array.tolist()] == extents


def test_block_status_lengths():
    structured, extended = HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED
    legal = {n for n in range(100) if wire.status_length_legal(structured, n)}
    assert legal == set(range(12, 100, 8))
    legal = {n for n in range(100) if wire.status_length_legal(extended, n)}
    assert legal == set(range(24, 100, 16))
    assert wire.status_length_legal(structured, 4 + 8 * (1 << 20))
    assert not wire.status_length_legal(structured, 4 + 8 * ((1 << 20) + 1))


def test_an_extended_block_status_must_hold_as_many_extents_as_it_says():
    payload = struct.pack(">II", 1, 2) + struct.pack(">QQ", 1, 1)
    with pytest.raises(NBDProtocolError):
        wire.decode_block_status(HeaderStyle.EXTENDED, payload)
