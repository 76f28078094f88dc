"""The NBD handshake, client side, without I/O: from the greeting to an open export.

Rules:

1.  The server greets first. Only fixed newstyle is spoken; anything else is refused.
2.  One option at a time: the next is sent when the final reply to the last has come.
3.  STARTTLS, if TLS is wanted, is the first option, and a refusal of it ends the handshake:
    there is no way back to plaintext. Between its ACK and the TLS handshake the server must
    be silent: what it says there was not protected, and ends the handshake.
4.  EXTENDED_HEADERS is tried first, then STRUCTURED_REPLY; a server may refuse both, and
    then metadata contexts cannot be had.
5.  The contexts are set for the same export that GO opens.
6.  The states and what leads from each to the next are `_NEXT`; a pair that is not there
    ends the handshake with the server's refusal. A state that is not wanted is skipped.

::

    GREETING -> STARTTLS -> TLS -> EXTENDED_HEADERS -> STRUCTURED_REPLY
                                          |                   |
                   READY <- GO <- SET_CONTEXTS <- LIST_CONTEXTS -> LISTED
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from qmpblock.errors import (
    Error,
    NBDConnectError,
    NBDProtocolError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.nbd import wire
from qmpblock.nbd.session import Session
from qmpblock.nbd.wire import (
    BlockSizes,
    HandshakeFlag,
    HeaderStyle,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

__all__ = ["Handshake", "State", "Wanted"]

MAX_INFOS = 64  # information replies to one GO; the protocol has four kinds
MAX_LISTED = 8192  # contexts of one LIST; QEMU has one for each dirty bitmap, and few more


class State(Enum):
    """Where the handshake stands: what is awaited from the server."""

    GREETING = "the greeting"
    STARTTLS = "the reply to STARTTLS"
    TLS = "the TLS handshake"
    EXTENDED_HEADERS = "the reply to EXTENDED_HEADERS"
    STRUCTURED_REPLY = "the reply to STRUCTURED_REPLY"
    LIST_CONTEXTS = "the reply to LIST_META_CONTEXT"
    SET_CONTEXTS = "the reply to SET_META_CONTEXT"
    GO = "the reply to GO"
    READY = "requests"
    LISTED = "nothing more"


class _Outcome(Enum):
    DONE = "done"  # granted, for an option
    REFUSED = "refused"  # the server answered with an error
    SKIPPED = "skipped"  # not wanted


_NEXT: Mapping[tuple[State, _Outcome], State] = MappingProxyType(
    {
        (State.GREETING, _Outcome.DONE): State.STARTTLS,
        (State.STARTTLS, _Outcome.DONE): State.TLS,
        (State.STARTTLS, _Outcome.SKIPPED): State.EXTENDED_HEADERS,
        (State.TLS, _Outcome.DONE): State.EXTENDED_HEADERS,
        (State.EXTENDED_HEADERS, _Outcome.DONE): State.LIST_CONTEXTS,
        (State.EXTENDED_HEADERS, _Outcome.REFUSED): State.STRUCTURED_REPLY,
        (State.STRUCTURED_REPLY, _Outcome.DONE): State.LIST_CONTEXTS,
        (State.STRUCTURED_REPLY, _Outcome.REFUSED): State.LIST_CONTEXTS,
        (State.LIST_CONTEXTS, _Outcome.DONE): State.LISTED,
        (State.LIST_CONTEXTS, _Outcome.SKIPPED): State.SET_CONTEXTS,
        (State.SET_CONTEXTS, _Outcome.DONE): State.GO,
        (State.SET_CONTEXTS, _Outcome.SKIPPED): State.GO,
        (State.GO, _Outcome.DONE): State.READY,
    }
)
_OPTIONS: Mapping[State, Option] = MappingProxyType(
    {
        State.STARTTLS: Option.STARTTLS,
        State.EXTENDED_HEADERS: Option.EXTENDED_HEADERS,
        State.STRUCTURED_REPLY: Option.STRUCTURED_REPLY,
        State.LIST_CONTEXTS: Option.LIST_META_CONTEXT,
        State.SET_CONTEXTS: Option.SET_META_CONTEXT,
        State.GO: Option.GO,
    }
)
# Errors that end the handshake even where a refusal would be tolerable: the first because
# no option will ever succeed, the second because the protocol says to leave.
_FINAL_ERRORS = frozenset({OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN})

_REMEDIES: Mapping[int, str] = MappingProxyType(
    {
        OptionReply.ERR_TLS_REQD: "this server demands TLS: give TLS credentials",
        OptionReply.ERR_UNKNOWN: "check the export's name against the server's list",
        OptionReply.ERR_SHUTDOWN: "the server is shutting down; try again when it is back",
    }
)
_SPEAKERS = ((b"SSH-", "an SSH server"), (b"{", "perhaps a QMP monitor"), (b"HTTP", "HTTP"))


@dataclass(frozen=True)
class Wanted:
    """What the handshake is to reach.

    :param export: name of the export; empty for the server's default.
    :param contexts: metadata contexts to select, by their full names.
    :param tls: whether to start TLS before all else.
    :param queries: if not None, only list the contexts that match (none: all of them).
    :raise RequestError: a name is longer than 4096 bytes, holds NUL, or is not Unicode, or a
        context has no namespace or is named twice.
    """

    export: str = ""
    contexts: Sequence[str] = ()
    tls: bool = False
    queries: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in (self.export, *self.contexts, *(self.queries or ())):
            try:
                encoded = name.encode()
            except UnicodeEncodeError:
                raise RequestError(f"the NBD name {printable(name)} is not Unicode") from None
            if len(encoded) > wire.MAX_STRING or b"\0" in encoded:
                raise RequestError(
                    f"the NBD name {printable(name, 60)} is longer than 4096 bytes or holds NUL"
                )
        for name in (*self.contexts, *(self.queries or ())):
            if not name.partition(":")[0] or ":" not in name:
                raise RequestError(f"the metadata context {printable(name)} has no namespace")
        if len(set(self.contexts)) != len(self.contexts):
            raise RequestError("a metadata context is named twice")


class Handshake:
    """One handshake. `parse` reads, `out` collects what to send, `state` says where it is.

    :ivar session: what was settled, once the state is READY.
    :ivar listed: the contexts' names, once the state is LISTED.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.state = State.GREETING
        self.out: list[wire.Bytes] = []
        self.session: Session | None = None
        self.listed: tuple[str, ...] = ()
        self._wanted = wanted
        self._style = HeaderStyle.SIMPLE
        self._contexts: dict[int, str] = {}
        self._export: tuple[int, TransmissionFlag] | None = None
        self._block_sizes: BlockSizes | None = None

    @property
    def haggling(self) -> bool:
        """Whether an option may be sent or awaited: the greeting is over, no export is open."""
        return self.state in _OPTIONS

    def parse(self) -> Generator[int, memoryview, None]:
        """Read up to READY or LISTED; yield how many bytes are needed, be sent them.

        :raise NBDProtocolError: the server broke the protocol.
        :raise NBDConnectError: it is no NBD server that we can talk to, or it refused.
        :raise UnsupportedError: it cannot do metadata contexts, and they were wanted.
        """
        yield from self._greeting()
        self._advance(_Outcome.DONE)
        while self.state not in (State.READY, State.LISTED):
            if self.state is State.TLS:
                yield 0  # nothing is read before tls_started(): rule 3
            refusal = yield from self._replies(_OPTIONS[self.state])
            if refusal is None:
                self._granted()
            elif (self.state, _Outcome.REFUSED) in _NEXT and refusal.final is False:
                self._advance(_Outcome.REFUSED)
            else:
                raise refusal.error

    def tls_started(self) -> None:
        """Go on under TLS: the caller has shaken hands and checked the certificates."""
        assert self.state is State.TLS
        self._advance(_Outcome.DONE)

    # -- moving on

    def _advance(self, outcome: _Outcome) -> None:
        """Enter the next state that is wanted, and ask its question."""
        self.state = _NEXT[self.state, outcome]
        while not self._is_wanted(self.state):
            self.state = _NEXT[self.state, _Outcome.SKIPPED]
        if self.state in (State.LIST_CONTEXTS, State.SET_CONTEXTS):
            self._need_contexts()
        if self.state in _OPTIONS:
            option = _OPTIONS[self.state]
            self.out.append(wire.encode_option(option, self._data_of(option)))

    def _is_wanted(self, state: State) -> bool:
        if state is State.STARTTLS:
            return self._wanted.tls
        if state is State.LIST_CONTEXTS:
            return self._wanted.queries is not None
        if state is State.SET_CONTEXTS:
            return bool(self._wanted.contexts)
        return True

    def _data_of(self, option: Option) -> bytes:
        export = self._wanted.export.encode()
        if option is Option.GO:
            return wire.encode_go(export, [Info.BLOCK_SIZE])
        if option is Option.SET_META_CONTEXT:
            return wire.encode_contexts(export, [c.encode() for c in self._wanted.contexts])
        if option is Option.LIST_META_CONTEXT:
            return wire.encode_contexts(export, [q.encode() for q in self._wanted.queries or ()])
        return b""

    def _need_contexts(self) -> None:
        if self._style is HeaderStyle.SIMPLE:
            raise UnsupportedError(
                "this NBD server offers neither structured replies nor extended headers, "
                "so it cannot say which parts of a disk are allocated"
            )

    def _granted(self) -> None:
        """Act on the ACK to the current option, then move on."""
        if self.state is State.EXTENDED_HEADERS:
            self._style = HeaderStyle.EXTENDED
        elif self.state is State.STRUCTURED_REPLY:
            self._style = HeaderStyle.STRUCTURED
        elif self.state is State.LIST_CONTEXTS:
            self.listed = tuple(self._contexts.values())
        elif self.state is State.GO:
            self._open()
        self._advance(_Outcome.DONE)

    def _open(self) -> None:
        if self._export is None:
            raise NBDProtocolError("the server acknowledged GO without describing the export")
        size, flags = self._export
        if self._style is HeaderStyle.SIMPLE:
            flags &= ~TransmissionFlag.SEND_DF  # the server MUST leave it clear; some did not
        if not flags & TransmissionFlag.SEND_WRITE_ZEROES:
            flags &= ~TransmissionFlag.SEND_FAST_ZERO  # likewise
        self.session = Session(
            export=self._wanted.export,
            size=size,
            flags=flags,
            style=self._style,
            block_sizes=self._block_sizes or wire.DEFAULT_BLOCK_SIZES,
            contexts=MappingProxyType(self._contexts),
        )

    # -- reading

    def _greeting(self) -> Generator[int, memoryview, None]:
        """Read the greeting, and answer it.

        | S: 64 bits, `NBDMAGIC`
        | S: 64 bits, `IHAVEOPT`
        | S: 16 bits, handshake flags
        """
        magic = bytes((yield len(wire.NBDMAGIC)))
        if magic != wire.NBDMAGIC:
            raise not_nbd(magic)
        magic = bytes((yield len(wire.IHAVEOPT)))
        if magic == wire.OLDSTYLE_MAGIC:
            raise NBDConnectError(
                "the NBD server speaks the oldstyle protocol, without export names and options",
                remedy="use a server of this century: qemu-nbd, QEMU itself, nbdkit",
            )
        if magic != wire.IHAVEOPT:
            raise NBDProtocolError(f"the NBD greeting goes on with {printable(magic)}")
        flags = int.from_bytes((yield wire.GREETING_FLAGS_SIZE))
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise NBDConnectError("the NBD server does not speak the fixed newstyle protocol")
        self.out.append(
            wire.encode_client_flags(
                HandshakeFlag.FIXED_NEWSTYLE | (flags & HandshakeFlag.NO_ZEROES)
            )
        )

    def _replies(self, option: Option) -> Generator[int, memoryview, _Refusal | None]:
        """Read the replies to one option to the last; None if that is an ACK."""
        limit = {
            Option.GO: MAX_INFOS,
            Option.LIST_META_CONTEXT: MAX_LISTED,
            Option.SET_META_CONTEXT: len(self._wanted.contexts),
        }.get(option, 0)
        self._contexts = self._contexts if option is Option.GO else {}
        for _ in range(limit + 1):
            header = wire.decode_option_reply((yield wire.OPTION_REPLY_SIZE))
            if header.option != option:
                raise NBDProtocolError(
                    f"the server answers option {header.option} when {option.name} was asked"
                )
            data = bytes((yield header.length)) if header.length else b""
            if header.type & wire.REPLY_ERROR_BIT:
                return self._refusal(option, header.type, data)
            if header.type == OptionReply.ACK:
                if data:
                    raise NBDProtocolError(f"the ACK of {option.name} carries {len(data)} bytes")
                return None
            self._take(option, header.type, data)
        raise NBDProtocolError(f"the server's reply to {option.name} does not end")

    def _take(self, option: Option, kind: int, data: bytes) -> None:
        """Take one reply that is neither the ACK nor an error."""
        if kind == OptionReply.INFO and option is Option.GO:
            self._take_info(data)
        elif kind == OptionReply.META_CONTEXT and option is Option.SET_META_CONTEXT:
            self._take_context(data)
        elif kind == OptionReply.META_CONTEXT and option is Option.LIST_META_CONTEXT:
            # Ids mean nothing in a list: a running number keeps the names in their order.
            self._contexts[len(self._contexts)] = wire.decode_meta_context(data)[1]
        else:
            raise NBDProtocolError(f"the server answers {option.name} with reply type {kind:#x}")

    def _take_info(self, data: bytes) -> None:
        kind = wire.decode_info_type(data)
        if kind == Info.EXPORT:
            export = wire.decode_info_export(data)
            if self._export not in (None, export):
                raise NBDProtocolError("the server describes the export twice, differently")
            self._export = export
        elif kind == Info.BLOCK_SIZE:
            sizes = wire.decode_info_block_size(data)
            if self._block_sizes not in (None, sizes):
                raise NBDProtocolError("the server gives two different sets of block sizes")
            self._block_sizes = sizes
        # Name, description and whatever is invented later: the protocol says to ignore them.

    def _take_context(self, data: bytes) -> None:
        number, name = wire.decode_meta_context(data)
        if name not in self._wanted.contexts:
            raise NBDProtocolError(f"the server selects the context {printable(name)}, unasked")
        if number in self._contexts or name in self._contexts.values():
            raise NBDProtocolError(f"the server selects the context {printable(name)} twice")
        self._contexts[number] = name

    def _refusal(self, option: Option, kind: int, data: bytes) -> _Refusal:
        try:
            name = OptionReply(kind).name
        except ValueError:
            name = f"error {kind:#x}"
        words = printable(data[: wire.MAX_STRING].decode(errors="backslashreplace"))
        about = f" of the export {printable(self._wanted.export)!r}"
        export = about if option in (Option.GO, Option.SET_META_CONTEXT) else ""
        error = NBDConnectError(
            f"the NBD server refused {option.name}{export} with {name}"
            + (f": {words}" if words else ""),
            remedy=_REMEDIES.get(kind),
        )
        return _Refusal(error, final=kind in _FINAL_ERRORS)


@dataclass(frozen=True)
class _Refusal:
    error: Error
    final: bool


def not_nbd(said: bytes) -> NBDConnectError:
    """Say that what greeted us is no NBD server, and what it looks like."""
    looks = next((f" ({who})" for prefix, who in _SPEAKERS if said.startswith(prefix)), "")
    words = printable(said.decode(errors="backslashreplace"))
    return NBDConnectError(
        f"what listens there is not an NBD server{looks}: it said {words}",
        remedy="check the address",
    )
