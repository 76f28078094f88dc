"""The handshake: what an honest server leads to, and each lie of another."""

from __future__ import annotations

import struct

import fake_server as fake
import pytest
from driving import before, new, opened, options_in, sent

from qmpblock.errors import Error, NBDConnectError, NBDProtocolError, RequestError, UnsupportedError
from qmpblock.nbd.protocol import Listed, Opened, Protocol, StartTLS, State, Wanted

CONTEXTS = {7: "base:allocation", 9: "qemu:allocation-depth"}
ABORT = b"IHAVEOPT" + struct.pack(">II", 2, 0)


def _failure(protocol: Protocol) -> Error:
    assert protocol.failure is not None
    assert protocol.events_received() == []
    return protocol.failure


@pytest.mark.parametrize("style", fake.STYLES)
def test_the_best_style_that_the_server_has_is_used(style: str):
    session = opened(fake.Settings(style=style, size=12345)).session
    assert session.style.name.lower() == style
    assert session.size == 12345


def test_extended_headers_are_asked_for_first_and_then_nothing_else():
    protocol = new(fake.Settings(style=fake.EXTENDED))
    protocol.receive_data(fake.greeting())
    assert [o for o, _ in options_in(sent(protocol))] == [fake.EXTENDED_HEADERS]
    protocol.receive_data(fake.option_reply(fake.EXTENDED_HEADERS, fake.ACK))
    assert [o for o, _ in options_in(sent(protocol))] == [fake.GO]


@pytest.mark.parametrize(("flags", "answer"), [(3, 3), (1, 1), (0xFFFF, 3)])
def test_client_flags_are_those_that_the_server_offered(flags: int, answer: int):
    protocol = new()
    protocol.receive_data(fake.greeting(flags))
    assert sent(protocol)[:4] == struct.pack(">I", answer)


def test_the_export_and_its_contexts_are_asked_for_by_name():
    protocol = Protocol(Wanted("disk", ("a:b",)))
    protocol.receive_data(fake.greeting())
    protocol.receive_data(fake.option_reply(fake.EXTENDED_HEADERS, fake.ACK))
    (_, data) = options_in(sent(protocol))[-1]
    assert data == b"\0\0\0\4disk" + b"\0\0\0\1" + b"\0\0\0\3a:b"
    protocol.receive_data(fake.context_reply(0, "a:b") + fake.option_reply(10, fake.ACK))
    ((option, data),) = options_in(sent(protocol))
    assert (option, data) == (fake.GO, b"\0\0\0\4disk" + b"\0\1\0\3")


def test_contexts_and_block_sizes_are_kept():
    sizes = (512, 65536, 1 << 26)
    session = opened(fake.Settings(contexts=CONTEXTS, block_sizes=sizes)).session
    assert session.contexts == CONTEXTS
    assert session.block_sizes == sizes


def test_without_block_size_information_the_defaults_of_the_protocol_hold():
    assert opened().session.block_sizes == (1, 4096, 32 * fake.MIB)


def test_name_description_and_unknown_information_are_ignored():
    protocol = before(fake.GO)
    for kind in (1, 2, 77):
        protocol.receive_data(fake.option_reply(fake.GO, fake.INFO, struct.pack(">H", kind) + b"x"))
    protocol.receive_data(fake.answer_option(fake.Settings(), fake.GO))
    assert isinstance(protocol.events_received()[0], Opened)


def test_a_server_may_grant_fewer_contexts():
    protocol = before(fake.SET_CONTEXTS, fake.Settings(contexts=CONTEXTS))
    protocol.receive_data(fake.option_reply(fake.SET_CONTEXTS, fake.ACK))
    protocol.receive_data(fake.answer_option(fake.Settings(), fake.GO))
    assert protocol.session.contexts == {}


def test_flags_that_cannot_be_are_cleared():
    flags = fake.ALL_FLAGS & ~64  # no WRITE_ZEROES: FAST_ZERO means nothing
    session = opened(fake.Settings(style=fake.SIMPLE, flags=flags)).session
    assert session.flags == flags & ~128 & ~2048


def test_contexts_are_listed_and_then_leave_is_taken():
    protocol = Protocol(Wanted("e", queries=("q:",)))
    protocol.receive_data(fake.greeting())
    protocol.receive_data(fake.option_reply(fake.EXTENDED_HEADERS, fake.ACK))
    ((option, data),) = options_in(sent(protocol))[-1:]
    assert (option, data) == (fake.LIST_CONTEXTS, b"\0\0\0\1e\0\0\0\1\0\0\0\2q:")
    names = ["q:b", "q:a", "q:c"]
    for name in names:  # ids mean nothing in a list, and QEMU's are all 0
        protocol.receive_data(fake.context_reply(0, name, fake.LIST_CONTEXTS))
    protocol.receive_data(fake.option_reply(fake.LIST_CONTEXTS, fake.ACK))
    assert protocol.events_received() == [Listed(tuple(names))]
    assert sent(protocol) == ABORT


# -- greetings


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "SSH server"),
        (b'{"QMP": {"version": {"qemu": {}}}}\r\n', "QMP monitor"),
        (b"HTTP/1.1 400 Bad Request\r\n", "HTTP"),
        (b"\x1b[2J\x1b[31mred", r"\\x1b\[2J\\x1b"),
    ],
)
def test_a_greeting_that_is_not_nbd(said: bytes, words: str):
    protocol = new()
    protocol.receive_data(said)
    assert isinstance(_failure(protocol), NBDConnectError)
    with pytest.raises(NBDConnectError, match=words):
        raise _failure(protocol)
    assert sent(protocol) == b""


def test_a_short_greeting_that_is_not_nbd_is_shown_at_its_end():
    protocol = new()
    protocol.receive_data(b"No!\n")
    protocol.receive_eof()
    assert "it said No!\\n" in str(_failure(protocol))


def test_an_oldstyle_server():
    protocol = new()
    protocol.receive_data(fake.oldstyle_greeting())
    assert "oldstyle" in str(_failure(protocol))


def test_a_server_without_fixed_newstyle():
    protocol = new()
    protocol.receive_data(fake.greeting(2))
    assert "fixed newstyle" in str(_failure(protocol))
    assert sent(protocol) == b""


def test_a_greeting_that_goes_wrong_half_way():
    protocol = new()
    protocol.receive_data(b"NBDMAGIC" + b"IHAVEAPT" + b"\0\3")
    assert isinstance(_failure(protocol), NBDProtocolError)


# -- lies in replies to options: all of them fatal, none answered

GO, SET = fake.GO, fake.SET_CONTEXTS
LIES = {
    "wrong magic": (GO, bytes(20)),
    "reply to another option": (GO, fake.export_info() + fake.option_reply(3, fake.ACK)),
    "reply too long": (GO, fake.option_reply(GO, fake.INFO, length=8193)),
    "reply far too long": (GO, fake.option_reply(GO, 0x80000001, length=2**32 - 1)),
    "ack with data": (GO, fake.option_reply(GO, fake.ACK, b"x")),
    "ack without export": (GO, fake.block_size_info() + fake.option_reply(GO, fake.ACK)),
    "unknown reply type": (GO, fake.option_reply(GO, 99)),
    "context in reply to go": (GO, fake.option_reply(GO, fake.META_CONTEXT, b"\0\0\0\1a:b")),
    "information without type": (GO, fake.option_reply(GO, fake.INFO, b"\0")),
    "size beyond 2^63-1": (GO, fake.export_info(2**63)),
    "no HAS_FLAGS": (GO, fake.export_info(flags=0)),
    "two sizes": (GO, fake.export_info(5) + fake.export_info(6)),
    "two block sizes": (GO, fake.block_size_info(1) + fake.block_size_info(512)),
    "minimum block not a power of 2": (GO, fake.block_size_info(3)),
    "maximum below preferred": (GO, fake.block_size_info(1, 4096, 1024)),
    "endless information": (GO, fake.export_info() * 1000),
    "information in reply to contexts": (SET, fake.option_reply(SET, fake.INFO, b"\0\1")),
    "context unasked": (SET, fake.context_reply(1, "x:y")),
    "context id twice": (
        SET,
        fake.context_reply(1, CONTEXTS[7]) + fake.context_reply(1, CONTEXTS[9]),
    ),
    "context twice": (SET, fake.context_reply(1, CONTEXTS[7]) + fake.context_reply(2, CONTEXTS[7])),
    "context not utf-8": (SET, fake.option_reply(SET, fake.META_CONTEXT, b"\0\0\0\1\xff:")),
    "context without name": (SET, fake.option_reply(SET, fake.META_CONTEXT, b"\0\0\0\1")),
    "structured with data": (8, fake.option_reply(8, fake.ACK, b"x")),
    "structured with information": (8, fake.option_reply(8, fake.INFO, b"\0\1")),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_handshake_is_fatal(lie: str):
    option, said = LIES[lie]
    protocol = before(option, fake.Settings(contexts=CONTEXTS))
    protocol.receive_data(said)
    assert isinstance(_failure(protocol), NBDProtocolError)
    assert sent(protocol) == b""
    protocol.receive_data(fake.answer_option(fake.Settings(), option))
    assert protocol.events_received() == []


# -- refusals: the handshake ends, in an orderly way


@pytest.mark.parametrize("polite", [True, False])
@pytest.mark.parametrize(
    ("option", "kind", "words"),
    [
        (fake.GO, fake.ERR_UNKNOWN, "ERR_UNKNOWN: no such thing"),
        (fake.GO, fake.ERR_POLICY, "refused GO"),
        (fake.GO, fake.ERR_TLS_REQD, "demands TLS"),
        (fake.GO, 0x8000_1234, "error 0x80001234"),
        (fake.SET_CONTEXTS, fake.ERR_UNKNOWN, "SET_META_CONTEXT"),
        (fake.EXTENDED_HEADERS, fake.ERR_TLS_REQD, "demands TLS"),
        (fake.STRUCTURED_REPLY, fake.ERR_SHUTDOWN, "shutting down"),
        (fake.STARTTLS, fake.ERR_POLICY, "refused STARTTLS"),
    ],
)
def test_a_refusal_ends_the_handshake(polite: bool, option: int, kind: int, words: str):
    settings = fake.Settings(contexts=CONTEXTS, tls=option == fake.STARTTLS)
    protocol = before(option, settings, polite=polite)
    protocol.receive_data(fake.option_reply(option, kind, b"no such thing\x1b[2J"))
    failure = _failure(protocol)
    assert isinstance(failure, NBDConnectError)
    assert words in str(failure)
    assert "\x1b" not in str(failure)
    assert sent(protocol) == (ABORT if polite else b"")


@pytest.mark.parametrize("polite", [True, False])
def test_contexts_from_a_server_with_simple_replies_only(polite: bool):
    settings = fake.Settings(style=fake.SIMPLE, contexts=CONTEXTS)
    protocol = before(fake.STRUCTURED_REPLY, settings, polite=polite)
    protocol.receive_data(fake.option_reply(fake.STRUCTURED_REPLY, fake.ERR_UNSUP))
    assert isinstance(_failure(protocol), UnsupportedError)
    assert sent(protocol) == (ABORT if polite else b"")


# -- TLS


def test_tls_comes_before_everything():
    protocol = new(fake.Settings(tls=True))
    protocol.receive_data(fake.greeting())
    assert [o for o, _ in options_in(sent(protocol))] == [fake.STARTTLS]
    protocol.receive_data(fake.option_reply(fake.STARTTLS, fake.ACK))
    assert protocol.events_received() == [StartTLS()]
    assert protocol.state is State.TLS
    assert sent(protocol) == b""
    protocol.tls_started()
    assert [o for o, _ in options_in(sent(protocol))] == [fake.EXTENDED_HEADERS]


@pytest.mark.parametrize("together", [True, False])
def test_plaintext_after_starttls_is_refused(together: bool):
    """An attacker's reply, to be read as if it had come under TLS (CVE-2011-0411 and kin)."""
    protocol = before(fake.STARTTLS, fake.Settings(tls=True))
    ack = fake.option_reply(fake.STARTTLS, fake.ACK)
    injected = fake.option_reply(fake.EXTENDED_HEADERS, fake.ERR_UNSUP)
    for piece in [ack + injected] if together else [ack, injected]:
        protocol.receive_data(piece)
    failure = protocol.failure
    assert isinstance(failure, NBDProtocolError)
    assert "plaintext" in str(failure)


def test_the_end_in_each_state_says_what_was_awaited():
    settings = fake.Settings(contexts=CONTEXTS)
    for option in (fake.EXTENDED_HEADERS, fake.STRUCTURED_REPLY, fake.SET_CONTEXTS, fake.GO):
        protocol = before(option, settings)
        protocol.receive_data(fake.answer_option(settings, option)[:-1])
        protocol.receive_eof()
        failure = _failure(protocol)
        assert isinstance(failure, NBDConnectError)
        assert protocol.state.value in str(failure)
    protocol = new()
    protocol.receive_data(b"NBDMAGIC")
    protocol.receive_eof()
    assert "the greeting" in str(_failure(protocol))


@pytest.mark.parametrize(
    "wanted",
    [
        {"export": "x" * 4097},
        {"export": "a\0b"},
        {"export": "\ud800"},
        {"contexts": ["base"]},
        {"contexts": [":x"]},
        {"contexts": ["a:b", "a:b"]},
        {"queries": ["base"]},
    ],
)
def test_names_that_cannot_be_asked_for(wanted: dict[str, object]):
    with pytest.raises(RequestError):
        Wanted(**wanted)  # type: ignore[arg-type]
